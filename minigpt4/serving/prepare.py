"""Turning a request's messages into a prompt.

Each message is a turn. If all text of a message precedes its pictures, as in OpenAI's examples, the pictures are moved
to the front, because the published weights were trained with pictures before text. With a `model.template` other than
vicuna_v0 they stay where they stand, as in training.
"""

from minigpt4.conversation import Chat, Conversation, PictureError, open_picture
from minigpt4.conversation.conversation import IMAGE_TURN
from minigpt4.conversation.pictures import FORMATS
from minigpt4.serving.answer import Prompt
from minigpt4.serving.errors import ApiError
from minigpt4.serving.protocol import Image, Message, Text

MAX_CHARACTERS = 100_000


def image_urls(messages: list[Message], max_images: int) -> dict[str, str]:
    """The URLs of all pictures, by place in the request, such as "messages[1].content[0]". Raises ApiError."""
    urls = {}
    for m, message in enumerate(messages):
        for p, part in enumerate(message.content):
            if isinstance(part, Image):
                place = f"messages[{m}].content[{p}]"
                if message.role != "user":
                    raise ApiError(400, f"{place}: only a user's message can hold a picture.", param=place)
                urls[place] = part.image_url.url
    if len(urls) > max_images:
        raise ApiError(400, f"{len(urls)} pictures are too many: at most {max_images} in a request.", "too_many_images")
    return urls


def read_prompt(chat: Chat, messages: list[Message], pictures: dict[str, bytes], max_pixels: int) -> Prompt:
    """The prompt of a request. `pictures` are the contents of its picture files, by place. Raises ApiError."""
    prompt = conversation(chat, messages).get_prompt()
    tokens = chat.num_tokens(prompt)
    if tokens >= chat.window():
        raise ApiError(
            400,
            f"The messages take {tokens} tokens; the model holds {chat.window()}, answer included. Send less text, "
            "fewer messages or fewer pictures.",
            "context_length_exceeded",
            "messages",
        )
    images = []
    for place, content in pictures.items():
        try:
            picture = open_picture(content, f"The picture in {place}", max_pixels, FORMATS)
            images.append(chat.vis_processor(picture))
        except PictureError as error:
            raise ApiError(400, str(error), "invalid_image", place) from None
    return Prompt(prompt, images, tokens)


def conversation(chat: Chat, messages: list[Message]) -> Conversation:
    """The messages as a conversation whose next answer is open. Raises ApiError."""
    length = sum(len(part.text) for message in messages for part in message.content if isinstance(part, Text))
    if length > MAX_CHARACTERS:
        raise ApiError(
            400, f"The messages have {length:,} characters; at most {MAX_CHARACTERS:,} are read.",
            "context_length_exceeded", "messages",
        )  # fmt: skip
    conv, system = chat.new_conversation(), []
    for n, message in enumerate(messages):
        text = _turn_text(chat, conv, message)
        if message.role == "assistant":
            conv.append_message(conv.roles[1], text)
        elif message.role != "user":  # system or developer
            if conv.messages:
                raise ApiError(400, "System messages must come before all others.", param=f"messages[{n}]")
            system.append(text)
        elif text:
            conv.add_to_question(text)
        else:
            raise ApiError(400, "A user's message is empty.", param="messages")
    if messages[-1].role != "user":
        raise ApiError(400, "The last message must be a user's.", param="messages")
    if system:
        conv.system = "\n".join(system)
    conv.append_message(conv.roles[1], None)
    return conv


def _turn_text(chat: Chat, conv: Conversation, message: Message) -> str:
    """The text of a turn, with a placeholder for each picture."""
    parts = message.content
    texts = [part for part in parts if isinstance(part, Text)]
    if conv.template is None and parts[: len(texts)] == texts:
        parts = [*parts[len(texts) :], *texts]
    texts = [chat.sanitize(part.text, conv) if isinstance(part, Text) else IMAGE_TURN for part in parts]
    return " ".join(text for text in texts if text)
