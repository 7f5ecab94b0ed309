"""A Hugging Face tokenizer.json as the tokenizer keys of a GGUF file."""

import json
from pathlib import Path
from typing import Any

from atomcli.checkpoint.files import read_json
from atomcli.errors import InputError, UnsupportedError

# llama.cpp names the way text is cut before byte pairs are merged; these are the patterns behind its names.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE = {rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_LETTERS}|\p{{N}}|{_REST}": "qwen2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def tokenizer_keys(directory: Path, vocabulary: int) -> dict[str, Any]:
    """The keys `tokenizer.*` for a model of `vocabulary` tokens.

    Raises InputError when there is no tokenizer.json, UnsupportedError for a kind that llama.cpp has no name for.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{directory} holds no tokenizer.json, and llama.cpp needs the tokenizer in the file")
    data, settings = read_json(path), read_json(directory / "tokenizer_config.json", missing_ok=True)
    model = data["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{path} is a {model.get('type')} tokenizer; GGUF files are written for BPE only")
    added = {token["id"]: token for token in data.get("added_tokens", [])}
    tokens = {index: token for token, index in model["vocab"].items()}
    tokens |= {index: token["content"] for index, token in added.items()}
    names = [tokens.get(index, f"[PAD{index}]") for index in range(max(vocabulary, *(index + 1 for index in tokens)))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bytewise = "ByteLevel" in json.dumps(data.get("pre_tokenizer"))
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2" if bytewise else "llama",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [_kind(index, name, index in tokens, added) for index, name in enumerate(names)],
    }
    if bytewise:
        keys |= {"tokenizer.ggml.pre": _pre(data["pre_tokenizer"], path), "tokenizer.ggml.merges": merges}
    elif model.get("byte_fallback"):
        keys["tokenizer.ggml.scores"] = _scores(names, merges)
    else:
        raise UnsupportedError(f"{path} is neither a byte-level nor a byte-fallback BPE; llama.cpp has no other")
    ids = {token: index for index, token in tokens.items()}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            keys[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    keys["tokenizer.ggml.add_bos_token"] = _adds_bos(data, settings.get("bos_token"))
    template = directory / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    return keys | ({"tokenizer.chat_template": chat} if isinstance(chat, str) else {})


def _kind(index: int, name: str, known: bool, added: dict[int, dict[str, Any]]) -> int:
    if not known:
        return _UNUSED
    if index in added:
        return _CONTROL if added[index].get("special") else _USER
    if name == "<unk>":
        return _UNKNOWN
    return _BYTE if len(name) == 6 and name.startswith("<0x") else _NORMAL


def _pre(pre_tokenizer: dict[str, Any], path: Path) -> str:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    pattern = parts[0].get("pattern", {}).get("Regex", "") if kinds == ["Split", "ByteLevel"] else ""
    if pattern not in _PRE:
        raise UnsupportedError(
            f"{path} cuts text before byte pairs in a way that llama.cpp has no name for ({', '.join(kinds)})",
            "Convert the tokenizer with llama.cpp's convert_hf_to_gguf.py.",
        )
    return _PRE[pattern]


def _scores(names: list[str], merges: list[str]) -> list[float]:
    """SentencePiece's scores: what is merged earlier has the higher one; what no merge makes has the lowest."""
    rank = {merge.replace(" ", "", 1): -float(position) for position, merge in reversed(list(enumerate(merges)))}
    return [rank.get(name, -float(len(merges))) for name in names]


def _adds_bos(data: dict[str, Any], bos: Any) -> bool:
    """Whether encoding a text puts the bos token in front."""
    token = bos.get("content") if isinstance(bos, dict) else bos
    return token is not None and json.dumps(token) in json.dumps(data.get("post_processor"))
