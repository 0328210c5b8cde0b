# A how-to of 2023, typed command by command, in the order of docs/tutorial.md, with a stand-in for each download. Run by
# tests/test_tutorial.py in sh and in bash. WORK has: MiniGPT-4/ (a copy of this repository), the two lists of BLIP's,
# cc_sbu_align/, and what was downloaded (weights/, in TORCH_HOME's cache, too). SIZES are options of small models.
# DATA_ONLY=yes ends it before the training.
set -eu

step() { echo "=== $*"; }

step the paths, written into the lines that the tutorials name
cd "$WORK/MiniGPT-4"
sed -i "16s|/path/to/vicuna/weights/|$WORK/weights/vicuna-small-v0|" minigpt4/configs/models/minigpt4.yaml
sed -i "11s|/path/to/pretrained/ckpt/|$WORK/weights/prerained_minigpt4_7b.pth|" eval_configs/minigpt4_eval.yaml
sed -i "5s|/path/to/laion_dataset/{00000..10488}.tar|$WORK/laion/laion_dataset/{00000..00000}.tar|" \
  minigpt4/configs/datasets/laion/defaults.yaml
sed -i "5s|/path/to/cc_sbu_dataset/{00000..01255}.tar|$WORK/cc_sbu/cc_sbu_dataset/{00000..00000}.tar|" \
  minigpt4/configs/datasets/cc_sbu/defaults.yaml
sed -i "5s|/path/to/cc_sbu_align/|$WORK/cc_sbu_align/|" minigpt4/configs/datasets/cc_sbu/align.yaml

step the data of stage 1, with copied scripts
for name in cc_sbu laion; do
  mkdir "$WORK/$name"
  mv "$WORK"/*"$([ $name = laion ] && echo laion || echo ccs)_synthetic_filtered_large.json" "$WORK/$name"
  cp dataset/convert_$name.py dataset/download_$name.sh "$WORK/$name"
done
for name in cc_sbu laion; do
  cd "$WORK/$name"
  python convert_$name.py --limit 20
  "$SHELL_OF_TEST" download_$name.sh --number_sample_per_shard 20 --timeout 10
done
cd "$WORK/MiniGPT-4"
[ "$DATA_ONLY" = no ] || exit 0

# A few steps on a CPU, at the size of the stand-ins.
SHORT="run.iters_per_epoch=2 run.max_epoch=1 run.num_workers=0 run.batch_size_train=2 run.device=cpu"

step stage 1
python -m torch.distributed.run --standalone --nproc-per-node 1 \
  train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml --options $SIZES $SHORT

step stage 2
sed -i "s|/path/to/stage1/checkpoint/|$(ls -d "$PWD"/output/minigpt4_stage1_pretrain/*)/checkpoint_0.pth|" \
  train_configs/minigpt4_stage2_finetune.yaml
python -m torch.distributed.run --standalone --nproc-per-node 1 \
  train.py --cfg-path train_configs/minigpt4_stage2_finetune.yaml --options $SIZES $SHORT

step the answers
python -m minigpt4 caption --dir "$WORK/cc_sbu_align/image" --out "$WORK/answers.jsonl" --max-new-tokens 4 \
  --cfg-path eval_configs/minigpt4_eval.yaml \
  --options $SIZES model.low_resource=False run.device=cpu "model.ckpt=$(ls -d "$PWD"/output/minigpt4_stage2_finetune/*)"
