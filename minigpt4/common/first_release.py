"""What to use in place of modules and names of the first releases that are gone.

This module is the last of Python's finders, so it is asked only for a module that no other has found.
"""

import sys
from collections.abc import Callable

PAGE = "docs/from_the_first_release.md"

CONVERSATION = "builder: conversation reads data of your own (docs/own_data.md)"
FIRST_ONLY = "this package is MiniGPT-4 of the first release; MiniGPT-v2 is not part of it"
LATER_DATA = f"this data set came with MiniGPT-v2; {CONVERSATION}"
EVALUATION = "python -m minigpt4 evaluate (docs/evaluation.md)"
VISION = "from minigpt4.models.vision import Vision"

# Under a package, names of its modules and of what it exported; under a module, names in it.
GONE = {
    "minigpt4.common.caption_tools": EVALUATION,
    "minigpt4.common.dist_utils.download_cached_file": "from minigpt4.weights.locate import fetch",
    "minigpt4.common.dist_utils.get_dist_info": "get_rank() and get_world_size() of the same module",
    "minigpt4.common.dist_utils.init_distributed_mode": "with process_group(cfg.run_cfg): … of the same module",
    "minigpt4.common.dist_utils.is_dist_avail_and_initialized": "is_distributed() of the same module",
    "minigpt4.common.dist_utils.main_process": "if is_main_process(): … of the same module",
    "minigpt4.common.dist_utils.setup_for_distributed": "logging: ranks other than 0 log warnings only",
    "minigpt4.common.eval_utils": EVALUATION,
    "minigpt4.common.gradcam": "nothing: no code called it",
    "minigpt4.common.logger.AttrDict": "types.SimpleNamespace of the library",
    "minigpt4.common.logger.SmoothedValue": "MetricLogger of the same module keeps the values itself",
    "minigpt4.common.optims.LinearWarmupCosineLRScheduler": "LinearWarmupCosineLR of the same module",
    "minigpt4.common.optims.LinearWarmupStepLRScheduler": "LinearWarmupStepLR of the same module",
    "minigpt4.common.utils": "the library: datetime for now(), facts.is_url for is_url(), weights.locate for downloads",
    "minigpt4.common.vqa_tools": EVALUATION,
    "minigpt4.conversation.conversation_v2": FIRST_ONLY,
    "minigpt4.datasets.builders.DatasetZoo": "registry.list_builders() of minigpt4.common.registry",
    "minigpt4.datasets.builders.base_dataset_builder.load_dataset_config": (
        "Config(args).datasets_cfg, with the defaults filled in (minigpt4/common/config.py)"
    ),
    "minigpt4.datasets.builders.dataset_zoo": "registry.list_builders() of minigpt4.common.registry",
    "minigpt4.datasets.builders.load_dataset": "task.build_datasets(cfg) (minigpt4/tasks/base_task.py)",
    "minigpt4.datasets.data_utils": "from minigpt4.datasets.loaders import TrainLoader, eval_loader",
    "minigpt4.datasets.datasets.base_dataset": "torch.utils.data.Dataset; CONTRIBUTING.md shows a data set",
    "minigpt4.datasets.datasets.caption_datasets": CONVERSATION,
    "minigpt4.datasets.datasets.cc_sbu_dataset.CCSBUDataset": (
        "from minigpt4.datasets.datasets.image_text_stream import ImageTextStream"
    ),
    "minigpt4.datasets.datasets.dataloader_utils": "from minigpt4.datasets.loaders import TrainLoader, eval_loader",
    "minigpt4.datasets.datasets.laion_dataset": (
        "from minigpt4.datasets.datasets.image_text_stream import ImageTextStream"
    ),
    "minigpt4.models.Blip2Base": VISION,
    "minigpt4.models.MiniGPTv2": FIRST_ONLY,
    "minigpt4.models.Qformer": "from minigpt4.models.qformer import QFormer, which needs no BERT file",
    "minigpt4.models.blip2": f"{VISION}; no BERT file is read, so there is no path of one to set",
    "minigpt4.models.blip2_outputs": "nothing: no code called it",
    "minigpt4.models.load_model": "MiniGPT4.from_config(cfg.model_cfg)",
    "minigpt4.models.load_model_and_preprocess": "load_chat(cfg, device) of minigpt4.conversation.loading",
    "minigpt4.models.load_preprocess": "from minigpt4.processors.base_processor import make_processor",
    "minigpt4.models.minigpt4": "from minigpt4.models.mini_gpt4 import MiniGPT4",
    "minigpt4.models.minigpt_base": "from minigpt4.models.mini_gpt4 import MiniGPT4",
    "minigpt4.models.minigpt_v2": FIRST_ONLY,
    "minigpt4.models.model_zoo": "registry.list_models() of minigpt4.common.registry",
    "minigpt4.models.modeling_llama": "from transformers import LlamaForCausalLM, unmodified",
    "minigpt4.processors.blip_processors.BlipImageBaseProcessor": "Blip2ImageTrainProcessor of the same module",
    "minigpt4.processors.load_processor": "from minigpt4.processors.base_processor import make_processor",
    "minigpt4.processors.randaugment": "nothing: no configuration used it",
    "minigpt4.tasks.setup_task": "registry.get_task_class(cfg.run_cfg.task).setup_task(cfg) (train.py)",
}
GONE |= {
    f"minigpt4.datasets.datasets.{name}": LATER_DATA
    for name in (
        *("aok_vqa_datasets", "coco_caption", "coco_dataset", "coco_vqa_datasets", "doc_dataset", "flickr"),
        *(
            "gqa_datasets",
            "llava_dataset",
            "multitask_conversation",
            "ocrvqa_dataset",
            "text_caps",
            "unnatural_instruction",
        ),
        *("vg_dataset", "vqa_datasets"),
    )
}
GONE |= {
    f"minigpt4.datasets.builders.image_text_pair_builder.{name}Builder": LATER_DATA
    for name in (
        *("AOKVQA", "AllRefCOCO", "COCOCaption", "COCOVQA", "CaptionToPhrase", "DocumentVQA", "GQA", "GroundedCaption"),
        *("LlavaDetail", "LlavaReason", "MultitaskConversation", "OCRVQA", "RefCOCO", "RefCOCOG", "RefCOCOP"),
        *("RefVisualGenome", "TextcapCaption", "UnnaturalInstruction"),
    )
}


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
