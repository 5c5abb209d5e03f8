"""A small tokenizer: one token for each printable ASCII character, and one for each word of the task."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 160
SPECIAL = ["<pad>", "<eos>", "<unk>"]
ASCII = ["\n", *map(chr, range(32, 127))]
# A message becomes its content and a newline, and the answer follows. There are no roles: the policy knows one turn.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def make_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on `texts` and saves it to `folder` in the layout of transformers."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=ASCII, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Unused entries pad the vocabulary to a size that suits the kernels of embedding and output head.
    tokenizer.add_tokens([f"<unused{i}>" for i in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return fast
