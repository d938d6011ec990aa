"""Columns: what becomes of every column of a record and of every key of a message.

Invariant: a name in these tables is read, or refused in one line where it holds something, because it would change the
conversation in a way that cannot be honoured. Any other name is bookkeeping: it is not read, and it is counted by name.
"""

READ = "read"

NO_MEDIA = "images, audio and files cannot be given to the model; leave such records out"
NO_TEMPLATE_ARGUMENTS = "one chat template with its own defaults renders all records; leave such records out"
NO_WEIGHTS = "tokens cannot be weighted or marked one by one; give each message a 'weight' of 0 or 1"

MARKS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale")
"""Names of a message's own mark: 0 or false says that it is not to be learnt."""
OTHER_MARKS = ("mask", "masked", "ignore", "ignored", "supervise", "supervised", "labels")
"""Names under which 0 or false means different things to different projects, or that mark tokens."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of what an assistant thought before its answer; kdpipe's own is the first."""
MEDIA = ("image", "images", "image_url", "video", "videos", "audio", "audios")
MESSAGE_MEDIA = (*MEDIA, "input_audio", "file", "files")

MESSAGE_KEYS: dict[str, str] = {
    "role": READ,
    "content": READ,
    "from": READ,  # ShareGPT's role
    "value": READ,  # ShareGPT's content
    "name": READ,
    "tool_calls": READ,
    "tool_call_id": READ,
    "function_call": READ,  # OpenAI's tool call of before 2023-11
    **dict.fromkeys(THOUGHTS, READ),
    **dict.fromkeys(MARKS, READ),
    **dict.fromkeys(MESSAGE_MEDIA, NO_MEDIA),
    "refusal": "it is what the assistant says instead of content; put it under 'content' to learn it",
    "channel": "give what stands in channel 'analysis' as 'reasoning_content' of the message that answers",
    "recipient": "give calls of tools as 'tool_calls'",
    "documents": "give documents in the text of a message",
    **dict.fromkeys(("tools", "functions"), "give them in the record's column 'tools'"),
    **dict.fromkeys(("thought", "thoughts", "tool_plan"), "give the thought as 'reasoning_content'"),
    **dict.fromkeys((*OTHER_MARKS, "train_detail", "training_detail"), NO_WEIGHTS),
}

ASSISTANT_KEYS = ("tool_calls", "function_call", *THOUGHTS)
"""Keys that say what the assistant does; a message of another role cannot have them."""

CALL_KEYS: dict[str, str] = {
    **dict.fromkeys(("name", "arguments", "function", "id", "type", "index", "description"), READ),
    **dict.fromkeys(("parameters", "params", "input", "inputs", "args", "kwargs"), "give arguments as 'arguments'"),
}
"""Of tool calls, and of the function in one."""

PART_KEYS: dict[str, str] = {
    "type": READ,
    "text": READ,
    **dict.fromkeys(MESSAGE_MEDIA, NO_MEDIA),
    **dict.fromkeys(MARKS, NO_WEIGHTS),
}
"""Of the parts of a message's content."""

ANSWERS = ("completion", "response", "output")
"""Columns that hold the answer to `prompt` or `instruction`."""
CHATS = ("messages", "conversations")
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
JSON_COLUMNS = (*TOOLS, "history", "documents", "chat_template_kwargs", *MEDIA)
"""Columns that hold no text but JSON, perhaps as its text."""
LABELS = ("label", "kto_tag")
"""Names under which KTO says whether the answer is good."""
SAMPLE_WEIGHTS = ("weight", "loss_weight", "sample_weight")

CUT = "finish_reason"
"""The column that says why an answer ends, as OpenAI's API does: "length" where it was cut before it came to an end."""
PROVENANCE = "kdpipe"
"""The column in which `kdpipe generate` says where a record comes from."""

RECORD_COLUMNS: dict[str, str] = {
    **dict.fromkeys(CHATS, READ),
    "prompt": READ,
    "instruction": READ,
    "input": READ,
    **dict.fromkeys(ANSWERS, READ),
    "text": READ,
    **dict.fromkeys(SYSTEMS, READ),
    "history": READ,
    **dict.fromkeys(TOOLS, READ),
    **dict.fromkeys(THOUGHTS, READ),
    # Read to see whether they say something else than the form does.
    "context": READ,
    "chosen": READ,
    **dict.fromkeys(LABELS, READ),
    **dict.fromkeys(MARKS, READ),
    **dict.fromkeys(SAMPLE_WEIGHTS, READ),
    CUT: READ,
    PROVENANCE: READ,
    **dict.fromkeys(MEDIA, NO_MEDIA),
    "documents": "give documents in the text of a message",
    "chat_template": "one chat template renders all records, that of the model's tokenizer",
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking", "reasoning_effort"), NO_TEMPLATE_ARGUMENTS),
    **dict.fromkeys(("loss_mask", "label_mask", "assistant_masks", "completion_mask", *OTHER_MARKS), NO_WEIGHTS),
}

OTHER_NAMES = {
    "question": "prompt",
    "query": "prompt",
    "answer": "completion",
    "conversation": "conversations",
    "dialogue": "messages",
    "dialog": "messages",
    "chat": "messages",
}
"""Columns that other projects use; they are not read, for what they hold differs from one to the next."""
