#!/bin/sh
# Download the pictures of CC3M + CC12M + SBU into webdataset shards, with the settings of the first release (wandb off).
#
#     sh download_cc_sbu.sh                                     # 16 processes, 128 threads each, 256 pixels
#     PROCESSES=8 THREADS=64 IMAGE_SIZE=256 WANDB=True sh download_cc_sbu.sh
#     DISTRIBUTOR=pyspark sh download_cc_sbu.sh                 # multiprocessing, pyspark or ray
#     sh download_cc_sbu.sh --retries 2 --timeout 20            # any flag of img2dataset's
#
# URL_LIST and OUTPUT_FOLDER are paths, relative to the working directory. Run again after an interruption, it goes on
# with the shards that are missing. This file can be copied anywhere; download_cc_sbu.sh and download_laion.sh differ in
# their names only.

set -eu

URL_LIST="${URL_LIST:-ccs_synthetic_filtered_large.tsv}"
OUTPUT_FOLDER="${OUTPUT_FOLDER:-cc_sbu_dataset}"
IMG2DATASET="${IMG2DATASET:-img2dataset}"

if ! command -v "$IMG2DATASET" >/dev/null; then
  cat >&2 <<'MESSAGE'
Error: there is no img2dataset. It needs older libraries than MiniGPT-4, so give it an environment of its own (about a
minute, 0.8 GB) in one of these ways:
  pipx install img2dataset==1.47.0
  uv tool install img2dataset==1.47.0
  python3 -m venv ~/img2dataset && ~/img2dataset/bin/pip install img2dataset==1.47.0
      and then: IMG2DATASET=~/img2dataset/bin/img2dataset sh download_cc_sbu.sh
With DISTRIBUTOR=pyspark or ray, add pyspark or ray to that environment: pipx inject img2dataset pyspark
MESSAGE
  exit 1
fi

# convert_cc_sbu.py --rows-per-file leaves a folder of TSVs instead of one.
if [ ! -e "$URL_LIST" ] && [ -d "${URL_LIST%.tsv}" ]; then
  URL_LIST="${URL_LIST%.tsv}"
fi
if [ ! -e "$URL_LIST" ]; then
  echo "Error: there is no $URL_LIST. Make it with convert_cc_sbu.py, or name it: URL_LIST=/data/list.tsv" >&2
  exit 1
fi

exists() { # whether one of these files does
  for file in "$@"; do
    if [ -e "$file" ]; then return 0; fi
  done
  return 1
}

# img2dataset overwrites shards that it has no statistics of.
if exists "$OUTPUT_FOLDER"/*.tar && ! exists "$OUTPUT_FOLDER"/*_stats.json "$OUTPUT_FOLDER/_tmp"; then
  echo "Error: $OUTPUT_FOLDER has shards that img2dataset did not write. Name another folder: OUTPUT_FOLDER=/data/new" >&2
  exit 1
fi

export NO_ALBUMENTATIONS_UPDATE=1 # a library of img2dataset's would ask the network for news

# Tutorials edit --enable_wandb here: it is off. WANDB=True turns it on.
exec "$IMG2DATASET" --url_list "$URL_LIST" --input_format tsv --url_col url --caption_col caption \
  --output_format webdataset --output_folder "$OUTPUT_FOLDER" \
  --processes_count "${PROCESSES:-16}" --thread_count "${THREADS:-128}" --image_size "${IMAGE_SIZE:-256}" \
  --enable_wandb "${WANDB:-False}" --distributor "${DISTRIBUTOR:-multiprocessing}" "$@"
