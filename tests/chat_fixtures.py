"""Tokenizers of single characters with chat templates in the manner of model families, for tests of forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}Functions within <tools></tools>:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.tool_calls %}<|im_start|>assistant
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif not (tools and loop.first and message.role == 'system') %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Qwen 3: a thought may come first; without one the prompt has an empty one.
QWEN3 = (
    HERMES
    + """
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}"""
)
# DeepSeek R1 and others: the prompt begins the thought.
THINKING = HERMES + "{%- if add_generation_prompt %}<think>\n{% endif %}"
XML = HERMES.replace(
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}',
    """<function={{ call.function.name }}>
{%- for key, value in call.function.arguments.items() %}
<parameter={{ key }}>
{{ value }}
</parameter>
{%- endfor %}
</function>""",
)
MISTRAL = (
    "{%- for message in messages %}{% if message.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ message.content }}[/INST]{% elif message.tool_calls %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{{ call.function | tojson }}{% endfor %}]</s>{% elif message.role == "tool" %}'
    "[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]{% else %}{{ message.content }}</s>{% endif %}"
    "{% endfor %}"
)
LLAMA3 = """\
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if tools and loop.last %}Respond with {"name": function name, "parameters": its arguments}
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
{% endif %}{{ message.content }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "hermes": HERMES,
    "qwen3": QWEN3,
    "thinking": THINKING,
    "xml": XML,
    "mistral": MISTRAL,
    "llama3": LLAMA3,
}
END = "<|im_end|>"
SPECIAL = ["<pad>", "<s>", END, "<|im_start|>"]


def chat_tokenizer(
    template: str | None, *, added: tuple[str, ...] = (), special: tuple[str, ...] = ()
) -> Any:  # Any: of transformers, untyped
    """A byte-level tokenizer of printable ASCII.

    template: a name of TEMPLATES.  added, special: texts that are one token; `skip_special_tokens` leaves out
    the latter.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level: printable characters stand for themselves.
    characters = ["Ġ", "Ċ", "ĉ", *(chr(code) for code in range(33, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=END,
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", *special],
    )
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    made.chat_template = None if template is None else TEMPLATES[template]
    return made


def save_chat_tokenizer(path: Path, template: str, **tokens: tuple[str, ...]) -> None:
    """The tokenizer as files of a model's folder."""
    chat_tokenizer(template, **tokens).save_pretrained(path)
