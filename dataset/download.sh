# What download_cc_sbu.sh and download_laion.sh share: check that img2dataset is there, and run it. They set URL_LIST and
# OUTPUT_FOLDER; the settings are environment variables, and what stands on the command line goes to img2dataset as it is.

set -euo pipefail

IMG2DATASET="${IMG2DATASET:-img2dataset}"
if ! command -v "$IMG2DATASET" >/dev/null; then
  cat >&2 <<'MESSAGE'
Error: there is no img2dataset. It needs older libraries than this project, so give it an environment of its own
(about a minute, 0.8 GB) in one of these ways:
  pipx install img2dataset==1.47.0
  uv tool install img2dataset==1.47.0
  python3 -m venv ~/img2dataset && ~/img2dataset/bin/pip install img2dataset==1.47.0
      and then: IMG2DATASET=~/img2dataset/bin/img2dataset bash dataset/download_….sh
With DISTRIBUTOR=pyspark or ray, add pyspark or ray to that environment: pipx inject img2dataset pyspark
MESSAGE
  exit 1
fi

# convert_….py --rows-per-file leaves a folder of TSVs instead of one.
if [ ! -e "$URL_LIST" ] && [ -d "${URL_LIST%.tsv}" ]; then
  URL_LIST="${URL_LIST%.tsv}"
fi
if [ ! -e "$URL_LIST" ]; then
  echo "Error: there is no $URL_LIST. Make it with dataset/convert_….py, or name it: URL_LIST=/data/list.tsv" >&2
  exit 1
fi

export NO_ALBUMENTATIONS_UPDATE=1 # a library of img2dataset's would ask the network for news

exec "$IMG2DATASET" --url_list "$URL_LIST" --input_format tsv --url_col url --caption_col caption \
  --output_format webdataset --output_folder "$OUTPUT_FOLDER" \
  --processes_count "${PROCESSES:-16}" --thread_count "${THREADS:-128}" --image_size "${IMAGE_SIZE:-256}" \
  --enable_wandb "${WANDB:-False}" --distributor "${DISTRIBUTOR:-multiprocessing}" "$@"
