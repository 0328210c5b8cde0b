"""What to use in place of modules and names of the first releases that are gone.

This module is the last of Python's finders, so it is asked only for a module that no other has found.
"""

import sys
from collections.abc import Callable

PAGE = "docs/from_the_first_release.md"

CONVERSATION = "builder: conversation reads data of your own (docs/own_data.md)"
EVALUATION = "python -m minigpt4 evaluate (docs/evaluation.md)"
FIRST_ONLY = "this package is MiniGPT-4 of the first release; MiniGPT-v2 is not part of it"
IMAGE_TEXT = "from minigpt4.datasets.datasets.image_text_stream import ImageTextStream"
LATER_DATA = f"this data set came with MiniGPT-v2; {CONVERSATION}"
LOADERS = "from minigpt4.datasets.loaders import TrainLoader, eval_loader"
MINI_GPT4 = "from minigpt4.models.mini_gpt4 import MiniGPT4"
PROCESSOR = "from minigpt4.processors.base_processor import make_processor"
UNCALLED = "nothing: no code called it"
VISION = "from minigpt4.models.vision import Vision"

# (package or module, the names in it that are gone, what to use now). Names in a package are modules, too.
TABLE = (
    ("common", "caption_tools eval_utils vqa_tools", EVALUATION),
    ("common", "gradcam", UNCALLED),
    ("common", "utils", "the library: datetime for now(), facts.is_url for is_url(), weights.locate for downloads"),
    ("common.dist_utils", "download_cached_file", "from minigpt4.weights.locate import fetch"),
    ("common.dist_utils", "get_dist_info", "get_rank() and get_world_size() of the same module"),
    ("common.dist_utils", "init_distributed_mode", "with process_group(cfg.run_cfg): … of the same module"),
    ("common.dist_utils", "is_dist_avail_and_initialized", "is_distributed() of the same module"),
    ("common.dist_utils", "main_process", "if is_main_process(): … of the same module"),
    ("common.dist_utils", "setup_for_distributed", "logging: ranks other than 0 log warnings only"),
    ("common.logger", "AttrDict", "types.SimpleNamespace of the library"),
    ("common.logger", "SmoothedValue", "MetricLogger of the same module keeps the values itself"),
    ("common.optims", "LinearWarmupCosineLRScheduler", "LinearWarmupCosineLR of the same module"),
    ("common.optims", "LinearWarmupStepLRScheduler", "LinearWarmupStepLR of the same module"),
    ("conversation", "conversation_v2", FIRST_ONLY),
    ("datasets", "data_utils", LOADERS),
    ("datasets.builders", "DatasetZoo dataset_zoo", "registry.list_builders() of minigpt4.common.registry"),
    ("datasets.builders", "load_dataset", "task.build_datasets(cfg) (minigpt4/tasks/base_task.py)"),
    (
        "datasets.builders.base_dataset_builder",
        "load_dataset_config",
        "Config(args).datasets_cfg, with the defaults filled in (minigpt4/common/config.py)",
    ),
    (
        "datasets.builders.image_text_pair_builder",
        "AOKVQABuilder AllRefCOCOBuilder COCOCaptionBuilder COCOVQABuilder CaptionToPhraseBuilder DocumentVQABuilder "
        "GQABuilder GroundedCaptionBuilder LlavaDetailBuilder LlavaReasonBuilder MultitaskConversationBuilder "
        "OCRVQABuilder RefCOCOBuilder RefCOCOGBuilder RefCOCOPBuilder RefVisualGenomeBuilder TextcapCaptionBuilder "
        "UnnaturalInstructionBuilder",
        LATER_DATA,
    ),
    (
        "datasets.datasets",
        "aok_vqa_datasets coco_caption coco_dataset coco_vqa_datasets doc_dataset flickr gqa_datasets llava_dataset "
        "multitask_conversation ocrvqa_dataset text_caps unnatural_instruction vg_dataset vqa_datasets",
        LATER_DATA,
    ),
    ("datasets.datasets", "base_dataset", "torch.utils.data.Dataset; CONTRIBUTING.md shows a data set"),
    ("datasets.datasets", "caption_datasets", CONVERSATION),
    ("datasets.datasets", "dataloader_utils", LOADERS),
    ("datasets.datasets", "laion_dataset", IMAGE_TEXT),
    ("datasets.datasets.cc_sbu_dataset", "CCSBUDataset", IMAGE_TEXT),
    ("models", "Blip2Base", VISION),
    ("models", "MiniGPTv2 minigpt_v2", FIRST_ONLY),
    ("models", "Qformer", "from minigpt4.models.qformer import QFormer, which needs no BERT file"),
    ("models", "blip2", f"{VISION}; no BERT file is read, so there is no path of one to set"),
    ("models", "blip2_outputs", UNCALLED),
    ("models", "load_model", "MiniGPT4.from_config(cfg.model_cfg)"),
    ("models", "load_model_and_preprocess", "load_chat(cfg, device) of minigpt4.conversation.loading"),
    ("models", "load_preprocess", PROCESSOR),
    ("models", "minigpt4 minigpt_base", MINI_GPT4),
    ("models", "model_zoo", "registry.list_models() of minigpt4.common.registry"),
    ("models", "modeling_llama", "from transformers import LlamaForCausalLM, unmodified"),
    ("processors", "load_processor", PROCESSOR),
    ("processors", "randaugment", "nothing: no configuration used it"),
    ("processors.blip_processors", "BlipImageBaseProcessor", "Blip2ImageTrainProcessor of the same module"),
    ("tasks", "setup_task", "registry.get_task_class(cfg.run_cfg.task).setup_task(cfg) (train.py)"),
)
GONE = {f"minigpt4.{place}.{name}": now for place, names, now in TABLE for name in names.split()}


def find_spec(name: str, path: object = None, target: object = None) -> None:
    """The method of a finder. Raises ImportError for a name that is gone; finds nothing."""
    if name in GONE:
        # Not a ModuleNotFoundError, which `from package import name` would replace by a message of its own.
        raise ImportError(f"{name} is of an earlier release. Now: {GONE[name]}. More: {PAGE}", name=name)


sys.meta_path.append(sys.modules[__name__])


def attributes_of(module: str) -> Callable[[str], None]:
    """The `__getattr__` of a module that has lost names."""

    def __getattr__(name: str) -> None:
        find_spec(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
