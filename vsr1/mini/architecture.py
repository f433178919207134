"""Define the mini models: their tokenizer, and a Qwen3-VL configuration of about 3 M parameters."""

from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig

from vsr1.mini import captions, world
from vsr1.mini.world import ATTRIBUTES
from vsr1.models import prompt_text

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<think>", "</think>", "<answer>", "</answer>", "<start>", "</start>",
    "<end>", "</end>", "<query_update>", "</query_update>",
)  # fmt: skip
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUERY_PREFIXES = ("", "", "Find the video: ", "Show me a clip. ", "Which video is it? ")
QUERY_PREFIXES += ("Please search for this moment: ",)
CAPTION_PROMPT = "Describe what happens when."
SPARE_ROWS = 64  # of the embedding matrix above the vocabulary, as the real one has: room for <REFINE>


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen's special tokens; every word of the world and number to 199 is one token.

    Any other text still has ids (bytes), as with the real tokenizer.
    """
    pattern = Regex(r"[ ]?seconds>|[ ]?\p{L}+|\d{1,3}|\.\d|[ ]?[^\s\p{L}\p{N}]|\s")
    split = pre_tokenizers.Split(pattern, "isolated")
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    core.train_from_iterator(_texts(), trainer)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **ends)
    tokenizer.chat_template = CHAT
    return tokenizer


def _texts():
    """Return texts that hold every word the mini world uses, often enough that each becomes one token."""
    numbers = " ".join(f"<{n}.{n % 10} seconds>{n}" for n in range(200))
    roles = (
        "system\nuser\nassistant\nRepresent the user's input. matched not_matched Query: Retrieved video: "
    )
    words = "the query asks for but the video shows same different no yes what who where when is it and or so to from "
    more = "From to as asked not , . : ? What colour is are does do Which Where When Focus on someone who scene there "
    texts = [numbers, roles, words, " " + words.title(), more, CAPTION_PROMPT, *QUERY_PREFIXES]
    texts += [prompt_text.SYSTEM, prompt_text.SYSTEM_ZS, prompt_text.SYSTEM_HQR, prompt_text.REWRITE]
    for table in (world.COLOURS, world.OBJECTS, captions.LIGHTS.values(), captions.ACTIONS.values()):
        texts += [f" {word}" for word in table]
    named = (ATTRIBUTES, captions.COARSE, ("colour",), ("object",), ("place",), ("light",))
    for dataset, places in world.PLACES.items():
        values = {name: world.values(name, dataset)[0] for name in ATTRIBUTES}
        for place, style, names in product(places, range(captions.STYLES), named):
            moment = world.Moment(0, 1, **(values | {"place": place}))
            texts.append(captions.caption(moment, style, names))
    texts += [text.lower() for text in texts]
    return (texts + [f" {text}" for text in texts]) * 3


def make_config(tokenizer) -> Qwen3VLConfig:
    """Return the configuration of the mini policy; a visual token covers 32 x 32 pixels of two frames, as in Qwen's."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}
    text = {
        "vocab_size": (len(tokenizer) // SPARE_ROWS + 1) * SPARE_ROWS,
        "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True
        },
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
