"""Text in, text out: what the models `chunkkv` and `tensorrt_llm_bls` share."""

from __future__ import annotations

from chunkkv.errors import RequestError
from chunkkv.triton.models.answers import ResponsePart
from chunkkv.triton.models.backend import ReadTensor
from chunkkv.triton.models.inputs import ParsedRequest, parse_request, prompt_text, scalar, strings
from chunkkv.triton.models.serving import Serving


def parse_text_request(
    read: ReadTensor, serving: Serving, excludes_input: bool = True, as_tensorrt_llm: bool = False
) -> ParsedRequest:
    """Return what a request with `text_input` asks for; raises RequestError as parse_request does."""
    prompt = prompt_text(read, "text_input", serving.max_prompt_bytes)
    if bad_words := strings(read, "bad_words"):
        raise RequestError(f"bad_words has {bad_words[0]!r}; this engine cannot forbid words: leave it out")
    return parse_request(
        read,
        prompt,
        strings(read, "stop_words"),
        serving.session.eos_token_ids,
        serving.session.limits.vocab_size,
        excludes_input=excludes_input,
        as_tensorrt_llm=as_tensorrt_llm,
    )


class ShownText:
    """The text of each response of one request.

    Parameters
    ----------
    read : reads the request's tensors.
    request : what it asks for.
    """

    def __init__(self, read: ReadTensor, request: ParsedRequest) -> None:
        self._accumulates = bool(scalar(read, "accumulate_tokens", False)) and request.stream
        self._text = str(request.prompt) if request.echo else ""

    def of(self, part: ResponsePart) -> str:
        """Return the text of a response: the prompt before the first one where asked for, all so far if accumulated."""
        text, self._text = self._text + part.text, ""
        if self._accumulates:
            self._text = text
        return text
