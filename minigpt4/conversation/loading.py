"""Building a `Chat` from a config."""

import torch

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import UnknownNameError, registry
from minigpt4.conversation.conversation import Chat
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.models.fitting import log_doubts
from minigpt4.models.sampling import token_texts
from minigpt4.models.template import FirstRelease
from minigpt4.processors.base_processor import make_processor


def load_chat(cfg: Config, device: torch.device, warm_up: bool = False) -> Chat:
    """Build the model and its image processor on `device`. Raises ConfigError for weights that do not fit.

    warm_up: prepare for answers that are computed alone, so that the first one need not wait.
    """
    dtype = dist_utils.select_dtype(device, cfg.run_cfg.amp, cfg.run_cfg.amp_dtype)
    vis_processor = load_vis_processor(cfg)  # first: a mistake in it shows before anything slow begins
    model = registry.get_model_class(cfg.model_cfg.arch).build(cfg.model_cfg, device, dtype)
    log_doubts(cfg.model_cfg, model)
    if warm_up:
        cached_decoding.warm_up(model.llama_model)
        token_texts(model.tokenizer)  # a second, for a large vocabulary
    # The first release's chat differs a little from its training; its published weights expect that.
    template = getattr(model, "template", None)
    own = None if isinstance(template, FirstRelease) else template
    options = {"template": own, "video_backend": cfg.run_cfg.video_backend}
    return Chat(model, vis_processor, device, **options)


def load_vis_processor(cfg: Config):
    """The image processor of a chat.

    It is the first dataset's processor under `train`, because the first release's evaluation files name
    `blip2_image_eval` there. If there is none, or if it is the default for training, the default for evaluation is
    used. Raises ConfigError for an unknown name.
    """
    default = cfg.preprocess_cfg.vis_processor
    name, dataset = next(iter(cfg.datasets_cfg.items()), ("", None))
    own, key = dataset.vis_processor.get("train") if dataset else None, f"datasets.{name}.vis_processor.train"
    if own is None or own == default.get("train"):
        own, key = default.get("eval"), "preprocess.vis_processor.eval"
    try:
        return make_processor(key, own or {"name": "blip2_image_eval", "image_size": cfg.model_cfg.image_size})
    except UnknownNameError as error:
        raise ConfigError(str(error)) from None


def select_gpu(cfg: Config, gpu_id: int) -> torch.device:
    """The device of a chat: GPU `gpu_id` if `run.device` is "cuda", else the device that `run.device` names.

    Without a GPU it is the CPU, with a warning. Raises ConfigError if there are GPUs, but not GPU `gpu_id`.
    """
    if cfg.run_cfg.device != "cuda" or not torch.cuda.is_available():
        return dist_utils.select_device(cfg.run_cfg.device)
    count = torch.cuda.device_count()
    if not 0 <= gpu_id < count:
        raise ConfigError(f"--gpu-id {gpu_id}: this machine's GPUs are 0 to {count - 1}.")
    return dist_utils.select_device(f"cuda:{gpu_id}")
