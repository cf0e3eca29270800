"""Chat templates of our own, one for each way in which the families' published ones treat
messages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A template, and what it takes, worked out by hand: see TemplateFacts."""

    source: str
    no_content: str = "empty"
    objects: bool = True
    any_arguments: bool = False
    parts: frozenset[str] = frozenset()
    developer: bool = False
    late_system: bool = True


EVERY_ROLE = frozenset({"system", "user", "assistant", "tool"})
START, END = "{{ '<|im_start|>' + message.role + '\\n' ", " + '<|im_end|>\\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | map('tojson') | join) + "
    "'<|im_end|>\\n' }}{% endif %}"
)
CALL = '{{ \'<tool_call>{"name": "\' + call.name + \'", "arguments": \' }}'
FUNCTION = "{% if call.function %}{% set call = call.function %}{% endif %}"

FAMILIES = {
    # ChatML that knows no tools, as small models and the bundled one have it: content is
    # concatenated.
    "chatml": Family(
        "{% for message in messages %}"
        + START
        + "+ message['content']"
        + END
        + "{% endfor %}"
        + OPEN,
    ),
    # Hermes and Qwen 2.5: content is looked at only for truth, arguments are always spelled as
    # JSON.
    "hermes": Family(
        TOOLS
        + "{%- for message in messages %}{%- if message.role == 'assistant' and message.tool_calls "
        "%}" + "{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' + "
        "message.content }}{%- endif %}"
        + "{%- for call in message.tool_calls %}{%- if call.function is defined %}{%- set call = "
        "call.function %}"
        + '{%- endif %}{{- \'\\n<tool_call>\\n{"name": "\' }}{{- call.name }}{{- \'", "arguments": '
        "' }}"
        + "{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' "
        "}}" + "{%- elif message.role == 'tool' %}{%- if loop.previtem is not defined or "
        "loop.previtem.role != 'tool' %}"
        + "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<result>\\n' + message.content + "
        "'\\n</result>' }}"
        + "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
        + "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + "
        "'<|im_end|>\\n' }}{%- endif %}" + "{%- endfor %}" + OPEN,
        no_content="absent",
    ),
    # Qwen 3 as first published: the last question is searched for backwards, thoughts are cut out
    # of the content.
    "qwen3_first": Family(
        TOOLS
        + "{%- set ns = namespace(last=messages | length - 1) %}{%- for message in messages[::-1] "
        "%}"
        + "{%- set index = (messages | length - 1) - loop.index0 %}{%- if message.role == 'user' "
        + "and not message.content.startswith('<tool_response>') and ns.last == messages | length "
        "- 1 %}"
        + "{%- set ns.last = index %}{%- endif %}{%- endfor %}"
        + "{%- for message in messages %}{%- set content = message.content %}"
        + "{%- if message.role == 'assistant' %}{%- if '</think>' in content %}"
        + "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- endif %}"
        + "{{- '<|im_start|>' + message.role + '\\n' + content }}"
        + "{%- for call in message.tool_calls or [] %}"
        + FUNCTION
        + CALL
        + "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | "
        "tojson }}{%- endif %}"
        + "{{- '}</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        + OPEN,
        any_arguments=True,
    ),
    # Qwen 3 of today: what is no string is no content.
    "qwen3": Family(
        TOOLS
        + "{%- for message in messages %}{%- if message.content is string %}{%- set content = "
        "message.content %}"
        + "{%- else %}{%- set content = '' %}{%- endif %}{{- '<|im_start|>' + message.role + '\\n' "
        "+ content }}"
        + "{%- for call in message.tool_calls or [] %}"
        + FUNCTION
        + CALL
        + "{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | "
        "tojson }}{%- endif %}"
        + "{{- '}</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        + OPEN,
        no_content="absent",
        any_arguments=True,
    ),
    # Qwen 3 Coder: a tag for each argument.
    "qwen3_coder": Family(
        TOOLS
        + "{%- for message in messages %}{{- '<|im_start|>' + message.role }}"
        + "{%- if message.content is defined and message.content is string and message.content | "
        "trim | length > 0 %}"
        + "{{- '\\n' + message.content | trim }}{%- endif %}{%- for call in message.tool_calls or "
        "[] %}"
        + FUNCTION
        + "{{- '\\n<tool_call>\\n<function=' + call.name + '>\\n' }}{%- if call.arguments is "
        "defined %}"
        + "{%- for name, value in call.arguments | items %}{{- '<parameter=' + name + '>\\n' }}"
        + "{%- set value = value | tojson | safe if value is mapping or (value is sequence and "
        "value is not string) "
        + "else value | string %}{{- value }}{{- '\\n</parameter>\\n' }}{%- endfor %}{%- endif %}"
        + "{{- '</function>\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
        + OPEN,
        no_content="absent",
    ),
    # Granite 3: whatever stands in the message is added to text.
    "granite": Family(
        "{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + "
        "'<|end_of_role|>' "
        + "+ message['content'] }}{%- if message.tool_calls %}"
        + "{{- '<|tool_call|>' + (message.tool_calls | map(attribute='function') | list | tojson) "
        "}}{%- endif %}"
        + "{{- '<|end_of_text|>\\n' }}{%- endfor %}"
        + "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
    ),
    # Phi 3.5: the content is looked at before the role.
    "phi": Family(
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        + "{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] in "
        "['user', 'tool'] %}"
        + "{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}{% elif message['role'] == "
        "'assistant' %}"
        + "{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif "
        "%}",
    ),
    # LFM2: what is no text is spelled as JSON, so null would be printed.
    "lfm2": Family(
        "{{- bos_token }}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
        + "{%- set content = message.content %}{%- if content is not string %}{%- set content = "
        "content | tojson %}"
        + "{%- endif %}{{- content }}{%- if message.tool_calls %}{{- '<|tool_call_start|>[' }}"
        + "{%- for call in message.tool_calls %}{{- call.function.name + '(' }}"
        + "{%- for name, value in call.function.arguments.items() %}{{- name + '=' + value | "
        "tojson }}" + "{%- if not loop.last %}, {% endif %}{%- endfor %}{{- ')' }}{%- endfor %}{{- "
        "']<|tool_call_end|>' }}" + "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}" + OPEN,
    ),
    # Llama 3: one call a message and no more, its content unread; dates; another name for
    # arguments.
    "llama3": Family(
        "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = "
        "strftime_now('%Y') %}{%- endif %}"
        + "{{- date_string }}{%- for message in messages %}"
        + "{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in "
        "message) %}"
        + "{{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + "
        "'<|eot|>' }}"
        + "{%- elif 'tool_calls' in message %}{%- if not message.tool_calls | length == 1 %}"
        + "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif "
        "%}"
        + "{%- set call = message.tool_calls[0].function %}{{- '<|start|>assistant<|end|>\\n\\n' }}"
        + '{{- \'{"name": "\' + call.name + \'", "parameters": \' }}{{- call.arguments | tojson '
        '}}{{- "}<|eot|>" }}'
        + "{%- else %}{{- '<|start|>ipython<|end|>\\n\\n' }}"
        + "{%- if message.content is mapping or message.content is iterable %}{{- message.content "
        "| tojson }}"
        + "{%- else %}{{- message.content }}{%- endif %}{{- '<|eot|>' }}{%- endif %}{%- endfor %}"
        + "{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\\n\\n' }}{%- endif %}",
        no_content="absent",
    ),
    # Mistral: roles must alternate, ids have nine characters, text or calls but not nothing.
    "mistral": Family(
        "{{- bos_token }}{%- set ns = namespace(index=0) %}{%- for message in messages %}"
        + "{%- if message.role == 'user' or (message.role == 'assistant' and message.tool_calls is "
        "not defined) %}"
        + "{%- if (message.role == 'user') != (ns.index % 2 == 0) %}"
        + "{{- raise_exception('roles must alternate user and assistant') }}{%- endif %}"
        + "{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}"
        + "{%- for message in messages %}{%- if message.role == 'user' %}{{- '[INST]' + "
        "message.content + '[/INST]' }}"
        + "{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- "
        "'[TOOL_CALLS][' }}"
        + "{%- for call in message.tool_calls %}{%- set out = call.function | tojson %}{{- "
        "out[:-1] }}"
        + "{%- if not call.id is defined or call.id | length != 9 %}"
        + "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') "
        "}}{%- endif %}"
        + "{{- ', \"id\": \"' + call.id + '\"}' }}{%- endfor %}{{- ']' + eos_token }}"
        + "{%- elif message.role == 'assistant' %}{{- message.content + eos_token }}"
        + "{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content | string + "
        "'[/TOOL_RESULTS]' }}" + "{%- endif %}{%- endfor %}",
        no_content="absent",
        late_system=False,  # nor any other
    ),
    # DeepSeek: arguments are added to text as they are; an empty text and null are told apart.
    "deepseek": Family(
        "{{ bos_token }}{%- for message in messages %}{%- if message['role'] == 'user' %}"
        + "{{ '<|User|>' + message['content'] }}{%- endif %}"
        + "{%- if message['role'] == 'assistant' and message['tool_calls'] is defined %}"
        + "{%- if message['content'] is none %}{{ '<|Assistant|><calls>' }}"
        + "{%- else %}{{ '<|Assistant|>' + message['content'] + '<calls>' }}{%- endif %}"
        + "{%- for call in message['tool_calls'] %}{{ '<call>' + call['type'] + '<sep>' + "
        "call['function']['name'] "
        + "+ '\\n```json\\n' + call['function']['arguments'] + '\\n```<end>' }}{%- endfor %}"
        + "{{ '<end calls>' + eos_token }}{%- elif message['role'] == 'assistant' %}"
        + "{{ '<|Assistant|>' + message['content'] + eos_token }}{%- endif %}"
        + "{%- if message['role'] == 'tool' %}{{ '<output>' + message['content'] + '</output>' "
        "}}{%- endif %}"
        + "{%- endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}",
        no_content="null",
        objects=False,
        any_arguments=True,
        late_system=False,  # nor any other
    ),
    # SmolLM 3: blocks for training, macros, text or parts.
    "smol": Family(
        "{%- macro text(content) %}{% if content is string %}{{ content }}{% else %}"
        + "{% for part in content or [] %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}"
        + "{%- for message in messages %}{%- if message.role == 'assistant' %}{% generation %}"
        + "{{ '<|im_start|>assistant\\n' + text(message.content) }}"
        + "{%- for call in message.tool_calls or [] %}{{ call.function.name + "
        "call.function.arguments | string }}"
        + "{%- endfor %}{{ '<|im_end|>\\n' }}{% endgeneration %}"
        + "{%- else %}{{ '<|im_start|>' + message.role + '\\n' + text(message.content) + "
        "'<|im_end|>\\n' }}{%- endif %}" + "{%- endfor %}" + OPEN,
        no_content="absent",
        objects=False,
        any_arguments=True,
    ),
    # What prints null as Python does.
    "printer": Family(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}"
        + "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ "
        "call.function.arguments | tojson }}" + "{% endfor %}\n{% endfor %}",
        no_content="absent",
    ),
    # Multi-modal families: content must be parts.
    "parts": Family(
        "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
        + "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        + "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ "
        "call.function.arguments | tojson }}" + "{% endfor %}\n{% endfor %}",
        no_content="absent",
        parts=EVERY_ROLE,
    ),
    # gpt-oss: knows developers, and that a call has no more than one place.
    "developer": Family(
        "{% for message in messages %}{% if message.role in ['developer', 'system'] %}"
        + "{{ '<|start|>developer<|message|>' + message.content + '<|end|>' }}{% elif "
        "message.tool_calls %}"
        + "{% set call = message.tool_calls[0].function %}{{ '<|start|>assistant to=' + call.name "
        "+ '<|message|>' }}"
        + "{{ call.arguments | tojson }}<|call|>{% elif message.role == 'tool' %}"
        + "{{ '<|start|>tool<|message|>' + message.content | tojson + '<|end|>' }}{% else %}"
        + "{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif "
        "%}{% endfor %}",
        no_content="absent",
        developer=True,
    ),
}
