"""Chat templates that behave as those of well-known models do, and a tokenizer with their control tokens."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparsekd.trainer.corpus.tokenizer import END_OF_TEXT, train_tokenizer

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A system message that nobody gave, as SmolLM2 and Qwen2 have it.
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}",
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}",
)
# Contents trimmed, a start token of its own, no line break behind a turn.
LLAMA = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
# Turns must alternate, the assistant has another name, the system's text goes to the first question.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ first if loop.first else '' }}{{ m.content | trim }}{{ '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}"
)
# No header in front of an answer; the end-of-text token behind it.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# The last answer gets a think block, earlier ones lose theirs; calls of tools.
QWEN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set thought = thought if '</think>' in m.content else '' %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\n') %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% for call in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content }}"
    "{{ '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if loop.first and tools %}{{ '\n' + (tools | tojson) }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Calls are written only of messages whose content is null, as DeepSeek's template has it.
NULL_CALLS = CHATML.replace(
    "m.content +", "(m.tool_calls[0].function | tojson if m.content is none else m.content) +"
)
# The prompt opens a think block that histories do not have.
THINKER = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
# No control token at all.
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "[INST]", "[/INST]"]
NOT_SPECIAL = ["<|eot|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
"""Added, yet not special: as DeepSeek's marks of turns and Qwen's of thinking are."""


@cache
def _trained() -> str:
    code = Path(json.__file__).read_text(encoding="utf-8")
    inner = Tokenizer.from_str(
        train_tokenizer(
            [code, "user assistant model system", "a\n\n\n\nb" * 50], 420
        ).backend_tokenizer.to_str()
    )
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens([AddedToken(name, special=False, normalized=False) for name in NOT_SPECIAL])
    return inner.to_str()


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), eos_token=END_OF_TEXT, bos_token="<s>"
    )
    tokenizer.chat_template = template
    return tokenizer
