"""Convert BLIP's list for CC3M + CC12M + SBU to a TSV for `download_cc_sbu.sh`.

    python dataset/convert_cc_sbu.py                      # all of it, in the working directory
    python dataset/convert_cc_sbu.py --limit 1000         # a first try

The list: https://storage.googleapis.com/sfr-vision-language-research/BLIP/datasets/ccs_synthetic_filtered_large.json
"""

from pairs_to_tsv import main

if __name__ == "__main__":
    main(__doc__, "ccs_synthetic_filtered_large")
