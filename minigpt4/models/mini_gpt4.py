"""MiniGPT-4 (Zhu et al. 2023): image -> EVA-ViT -> Q-Former -> one linear layer -> language model.

B batch, Q query tokens, W width of the Q-Former (of an image [B,3,H,W]: its width), D width of the language model,
S sequence, K positions whose logits are computed, V vocabulary.
"""

import logging
import random
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import MiniGPT4Config
from minigpt4.common.registry import registry
from minigpt4.models import llm, loading, prompt, qformer, vision
from minigpt4.models.eva_vit import EvaViT
from minigpt4.models.generation import DecodingLoop, answer_text, continue_embeds
from minigpt4.models.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from minigpt4.models.template import Template


class PlainStep:
    """Computes a training step: one padded batch, with the plain modules.

    It serves training in float32 and evaluation. `MiniGPT4.accelerate` installs another step object, which computes the
    same numbers faster; the runner calls it for training in 16 bit.
    """

    def collate(self, model: "MiniGPT4", sequences: list[list[int]], labels: list[list[int]]) -> prompt.PaddedBatch:
        """Make a batch of token ids, with IMAGE_ID where image vectors belong, and their labels, not shifted."""
        return prompt.pad(sequences, labels, model.tokenizer.eos_token_id)

    def vision(self, model: "MiniGPT4", image: torch.Tensor) -> torch.Tensor:
        """The Q-Former's output [B,Q,W] for images [B,3,H,W]."""
        return model.query_outputs(image)

    def loss(self, model: "MiniGPT4", image_embeds: torch.Tensor, batch: prompt.PaddedBatch) -> torch.Tensor:
        """The mean cross-entropy over the labels of a batch, given its images [B,Q,D]."""
        logits = model.predict(model.embed(batch, image_embeds), batch)  # [B,K,V]
        return cross_entropies(logits, batch.targets).sum() / max(batch.num_labels, 1)


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropies [B*K] float32 of logits [B,K,V] and targets [B,K]; 0 where a target is to be ignored."""
    logits, targets = logits.float().flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=prompt.IGNORE_INDEX, reduction="none")


@registry.register_model("mini_gpt4")
class MiniGPT4(vision.Vision):
    """The whole model. Only `llama_proj` trains, unless `freeze_vit` or `freeze_qformer` is False, or `train` differs.

    Args:
        visual_encoder, Qformer, llama_model, tokenizer: the parts.
        num_query_token: vectors per image (Q).
        prompt_list: prompts with an image slot; a training batch uses one, drawn at random. Empty: the image alone.
        max_txt_len: maximum number of tokens of a training text, `end_sym` included.
        end_sym: the end of each training text that is not cut off.
        template: the text around the messages of conversations.
        learn_on: "answers", or "all" texts of a conversation after its first question.
        llm_grad_checkpoint: number of the language model's layers that recompute their activations.
        dtype: dtype in which the vision side and `llama_proj` compute.
        projector: registered name of the class of `llama_proj`.
        train: the parts that train, by the names of `model.train`. None: `llama_proj`, and what is not frozen.

    `trained_inside` lists modules inside frozen parts that follow the model's mode, such as adapters.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain_vicuna": "configs/models/minigpt4.yaml",
        "tiny": "configs/models/minigpt4_tiny.yaml",
    }
    config_class = MiniGPT4Config

    def __init__(
        self,
        visual_encoder: EvaViT,
        Qformer: qformer.QFormer,
        llama_model: nn.Module,
        tokenizer: Tokenizer,
        num_query_token: int = 32,
        prompt_list: list[str] | None = None,
        max_txt_len: int = 32,
        end_sym: str = "\n",
        template: "Template | None" = None,
        learn_on: str = "answers",
        freeze_vit: bool = True,
        freeze_qformer: bool = True,
        llm_grad_checkpoint: int = 0,
        dtype: torch.dtype = torch.float32,
        projector: str = "linear",
        train: Collection[str] | None = None,
    ):
        super().__init__(visual_encoder, Qformer, num_query_token, dtype)
        widths = Qformer.hidden_size, llama_model.get_input_embeddings().embedding_dim
        self.llama_proj = registry.get("projector", projector)(*widths)
        self.llama_model = llama_model
        self.tokenizer = tokenizer
        self.prompt_list = prompt_list or []
        self.max_txt_len, self.end_sym = max_txt_len, end_sym
        self.template, self.learn_on = template, learn_on
        self.step = PlainStep()
        llm.recompute_layers(llama_model, llm_grad_checkpoint)

        if train is None:
            train = ["projector", *["vit", "ln_vision"] * (not freeze_vit)]
            train += ["qformer", "query_tokens"] * (not freeze_qformer)
        parts = {"vit": visual_encoder, "ln_vision": self.ln_vision, "qformer": Qformer, "projector": self.llama_proj}
        self._frozen = [llama_model, *(module for part, module in parts.items() if part not in train)]
        self.trained_inside: list[nn.Module] = []
        for part in self._frozen:
            part.requires_grad_(False)
        self.query_tokens.requires_grad_("query_tokens" in train)
        self.train(self.training)

    def forward(self, samples: dict) -> dict:
        """The loss of a batch {"image": [images,3,H,W], "text_input": B texts, or B conversations}.

        A text has one image, a conversation (`datasets.conversations.batch.Conversations`) any number.
        "image_features" [B,Q,W] can replace "image". A batch from `prepare` is not tokenised again.
        Returns {"loss": mean cross-entropy over the tokens with labels, "num_labels": the number of these tokens}.
        """
        if samples.get("tokens_of") != [*samples["text_input"]]:  # not prepared, or a task changed the texts afterwards
            samples = self.prepare(samples)
        tokens = samples["tokens"].to(self.device)
        if "image_features" in samples:
            image_embeds = self.project(samples["image_features"])  # [B,Q,D]
        elif not len(samples["image"]):  # conversations without images; the result keeps the projection in the loss
            image_embeds = self.project(self.query_tokens[:0])
        else:
            image_embeds, _ = self.encode_img(samples["image"])
        self._check_images(image_embeds, tokens)
        return {"loss": self.step.loss(self, image_embeds, tokens), "num_labels": tokens.num_labels}

    def encode_img(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors [B,Q,D] in the language model's space for images [B,3,H,W], and an attention mask [B,Q] of ones."""
        image_embeds = self.project(self.step.vision(self, image))
        return image_embeds, torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image.device)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Vectors [B,Q,D] for the Q-Former's output [B,Q,W], which may come from a cache."""
        with self.autocast(features.device):
            return self.llama_proj(features.float())

    def predict(self, embeds: torch.Tensor, tokens: prompt.Batch) -> torch.Tensor:
        """Logits [B,K,V] for embeddings [B,S,D], at the K positions whose next token has a label in any row."""
        return self.llama_model(inputs_embeds=embeds, use_cache=False, **tokens.llm_inputs()).logits

    def embed(self, tokens: prompt.Batch, image_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings [B,S,D] of a batch's tokens, with `image_embeds` [images,Q,D] in the image slots."""
        embeds = self.llama_model.get_input_embeddings()(tokens.input_ids)
        return tokens.insert(embeds, image_embeds.reshape(-1, embeds.shape[-1]).to(embeds.dtype))

    def _check_images(self, image_embeds: torch.Tensor, tokens: prompt.Batch) -> None:
        """Raise ValueError unless the images [images,Q,D] have as many vectors as the texts have places for them."""
        given = image_embeds.shape[:-1].numel()
        if given != tokens.num_image_vectors:
            raise ValueError(
                f"The images have {given} vectors, the texts have places for {tokens.num_image_vectors}. Give each "
                f"text one image; every prompt needs an {prompt.IMAGE_SLOT}; `encode_img` must give as many vectors an "
                f"image as there are query tokens ({self.query_tokens.shape[1]})."
            )

    def sanitize(self, samples: dict) -> dict:
        """Break up markers of the prompt in the texts of a batch, as chat does in what a user types.

        Adds "broken_up": the beginnings of the texts that were changed. The runner calls this before `prepare`.
        """
        separators = self.template.separators if self.template else [self.end_sym, facts.SEPARATOR]
        sanitized, broken_up = prompt.sanitize_batch(samples.get("text_input", []), self.tokenizer, separators)
        return {**samples, "text_input": sanitized, "broken_up": broken_up} if broken_up else samples

    def prepare(self, samples: dict) -> dict:
        """Tokenise and collate the texts of a batch. The runner does this on the host, during the step before.

        Adds "tokens", "tokens_of" (their texts), "num_cut" (how many of these are longer than `max_txt_len`) and
        "drawn_prompt" (unless the batch has one), which a batch from the runner decides by its "prompt_draw".
        """
        texts = samples["text_input"]
        drawn = samples.get("drawn_prompt") or self._draw_prompt(samples.get("prompt_draw"))
        found = prompt.encode_batch(self.tokenizer, texts, drawn, self.text_settings)
        if found.images_seen is not None:
            samples = texts.select_images(samples, found.images_seen)
        tokens = self.step.collate(self, found.ids, found.labels)
        return {**samples, "tokens": tokens, "tokens_of": [*texts], "drawn_prompt": drawn, "num_cut": found.num_cut}

    @property
    def text_settings(self) -> prompt.TextSettings:
        num_query_tokens = self.query_tokens.shape[1]
        return prompt.TextSettings(num_query_tokens, self.max_txt_len, self.end_sym, self.template, self.learn_on)

    def _draw_prompt(self, draw: float | None) -> str:
        """A random prompt in training, the first one in evaluation, the image alone if there are no prompts.

        draw: a random number from 0 to 1, 1 excluded, that decides; None: one of this process.
        """
        if self.training and self.prompt_list:
            draw = random.random() if draw is None else draw
            return self.prompt_list[int(draw * len(self.prompt_list))]
        return self.prompt_list[0] if self.prompt_list else prompt.IMAGE_SLOT

    def accelerate(self, packed: bool, compiled: bool, fp8: bool = False) -> None:
        """Compute training steps with `fast/training_step.py` from now on. Only fp8 changes results beyond rounding.

        A step object that a plug-in's constructor has set stays; fp8 is then a ConfigError.
        """
        fast_step = registry.get("step", "fast")
        if type(self.step) in (PlainStep, fast_step):
            self.step = fast_step(self, packed, compiled, fp8)
        elif fp8:
            raise ConfigError(f"run.fp8=True: {type(self.step).__name__} has no layers in fp8. Set run.fp8=False.")
        else:
            logging.info("%s stays: run.packed and run.compile have no effect.", type(self.step).__name__)

    @torch.inference_mode()
    def generate(
        self,
        images: torch.Tensor | None,
        prompts: list[str],
        stop: str | None = None,
        decoding_loop: DecodingLoop | None = None,
        **options: Any,
    ) -> list[str]:
        """Continue each prompt; greedily by default.

        Args:
            images: [images,3,H,W], one for each image slot of the prompts, in order. None: the prompts have no slots.
            prompts: texts of any lengths, with `<ImageHere>` at the place of an image.
            stop: text that ends an answer. None: `end_sym`.
            decoding_loop: None: transformers' `generate` decodes. `fast.decoding.loop.cached_decoding` decodes faster.
            options: as for transformers' `generate`, for example max_new_tokens=60, num_beams=5, do_sample=True.

        Returns:
            The answers up to `stop`, stripped.

        Raises:
            ValueError: the numbers of images and slots differ.
        """
        stop = self.end_sym if stop is None else stop
        image_embeds = [] if images is None else self.encode_img(images)[0].unsqueeze(1)
        context, attention_mask = self.context(prompts, image_embeds)
        llm, tokenizer = self.llama_model, self.tokenizer
        rows = continue_embeds(llm, tokenizer, context, attention_mask, stop, decoding_loop=decoding_loop, **options)
        return [answer_text(tokenizer, row, stop) for row in rows.tolist()]

    def context(self, prompts: list[str], image_embeds: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B,S,D] of prompts to be continued, padded on the left, and their attention mask [B,S].

        `image_embeds` has one [1,Q,D] for each image slot of the prompts, in order. Otherwise raises ValueError.
        """
        slots = sum(text.count(prompt.IMAGE_SLOT) for text in prompts)
        if slots != len(image_embeds):
            raise ValueError(f"{slots} image slots ({prompt.IMAGE_SLOT}) in the prompts, {len(image_embeds)} images.")
        tokens = prompt.generation_batch(self.tokenizer, prompts, self.text_settings).to(self.device)
        images = torch.cat([*image_embeds]) if slots else self.query_tokens.new_empty(0, 0, 0)
        self._check_images(images, tokens)
        return self.embed(tokens, images.to(self.device)), tokens.attention_mask

    def train(self, mode: bool = True) -> "MiniGPT4":
        """Set the mode of the parts that train. Frozen parts stay in eval mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        for part in self.trained_inside:
            part.train(mode)
        return self

    @classmethod
    def from_config(
        cls, cfg: Mapping, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "MiniGPT4":
        """Build the model from the `model:` section. Frozen parts are loaded directly to `device`.

        Args:
            cfg: a mapping with the keys of `MiniGPT4Config`; absent keys have its defaults.
            device: device of the model.
            dtype: dtype of the frozen parts' computation (float16 or bfloat16 on a GPU). `vit_precision: fp32` exempts
                the encoder.

        Raises:
            CheckpointError: weights do not fit, or the language model is broken.
            ConfigError: weights cannot be found or downloaded.
        """
        cfg, device = cls.config_class(**cfg), torch.device(device)
        from minigpt4.models.template import read_prompts, resolve

        template = resolve(cfg)
        prompts = read_prompts(cfg.prompt_path, template.prompt) if cfg.prompt_path else []
        load_in = facts.load_in(cfg.load_in, cfg.low_resource)
        llm.check_settings(cfg.llama_model, device, load_in, cfg.llm_device_map)
        sources = loading.open_sources(cfg)
        loading.check_trained(sources.trained, sources.recorded, cfg)
        parts = loading.vision_parts(cfg, sources, device, dtype)
        trust = cfg.trust_remote_code
        llama_model = llm.load_llm(cfg.llama_model, device, dtype, load_in, cfg.llm_device_map, trust)
        tokenizer = load_tokenizer(cfg.llama_model, trust)
        llm.check_answers(llama_model, tokenizer, cfg.llama_model)
        if prompts:
            logging.info("Load %d training prompts\nPrompt Example \n%s", len(prompts), prompts[0])
        with torch.device(device):
            model = cls(
                **parts,
                llama_model=llama_model,
                tokenizer=tokenizer,
                prompt_list=prompts,
                max_txt_len=cfg.max_txt_len,
                end_sym=template.end,
                template=template,
                learn_on=cfg.learn_on,
                llm_grad_checkpoint=cfg.llm_grad_checkpoint,
                projector=cfg.projector,
                train=loading.trained_parts(cfg).names,
            )
        if not cfg.load_vision:
            model.drop_vision()
        loading.attach_llm_fingerprint(model, cfg, sources)
        loading.add_adapters(model, cfg)
        loading.load_rest(model, cfg, sources, device)
        loading.report(model)
        return model

    def drop_vision(self) -> None:
        """Remove encoder and Q-Former. Training from cached features needs neither."""
        self._frozen = [part for part in self._frozen if part in (self.llama_model, self.llama_proj)]
        self.visual_encoder = self.ln_vision = self.Qformer = None
