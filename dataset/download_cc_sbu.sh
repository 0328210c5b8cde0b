#!/usr/bin/env bash
# Download the pictures of CC3M + CC12M + SBU into webdataset shards, with the settings of the first release (wandb off).
#
#     bash dataset/download_cc_sbu.sh                                     # 16 processes, 128 threads each, 256 pixels
#     PROCESSES=8 THREADS=64 IMAGE_SIZE=256 WANDB=True bash dataset/download_cc_sbu.sh
#     DISTRIBUTOR=pyspark bash dataset/download_cc_sbu.sh                 # multiprocessing, pyspark or ray
#     bash dataset/download_cc_sbu.sh --retries 2 --timeout 20            # any flag of img2dataset's
#
# URL_LIST and OUTPUT_FOLDER are paths, relative to the working directory. Run again after an interruption, it goes on
# with the shards that are missing.

URL_LIST="${URL_LIST:-ccs_synthetic_filtered_large.tsv}"
OUTPUT_FOLDER="${OUTPUT_FOLDER:-cc_sbu_dataset}"
. "$(dirname "${BASH_SOURCE[0]}")/download.sh"
