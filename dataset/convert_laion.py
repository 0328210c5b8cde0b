"""Convert BLIP's list for LAION (115 million pairs) to TSVs for `download_laion.sh`.

    python dataset/convert_laion.py --rows-per-file 1000000     # img2dataset loads a file whole
    python dataset/convert_laion.py --limit 1000                # a first try

The list: https://storage.googleapis.com/sfr-vision-language-research/BLIP/datasets/laion_synthetic_filtered_large.json
"""

from pairs_to_tsv import main

if __name__ == "__main__":
    main(__doc__, "laion_synthetic_filtered_large")
