"""Errors in the words of a protocol that calls fields otherwise than OpenAI's chats do."""

import re
from collections.abc import Mapping

from moebius.errors import RequestError


def renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error, about fields as its client calls them.

    names   what each is called, by the name that it has in a chat; of two that fit, the longer one
            counts
    """
    if error.param is None:
        return error
    fits = [
        name
        for name in names
        if error.param == name or error.param.startswith((f"{name}.", f"{name}["))
    ]
    if not fits:
        return error
    name = max(fits, key=len)
    param = names[name] + error.param.removeprefix(name)
    text = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", names[name], str(error))
    return RequestError(text, param=param, code=error.code)
