"""What is left out of requests without harm, said once in the log, as clients send it all day."""

import logging

log = logging.getLogger(__name__)

_MOST = 100
_LENGTH = 80


class ToldOnce:
    """Logs each thing that was left out the first time; of clients' own words, a bounded number."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, what: str, name: object) -> None:
        """what: in our words; name: in a client's."""
        said = f"{what} {str(name)[:_LENGTH]!r}"
        if said not in self._told and len(self._told) < _MOST:
            self._told.add(said)
            log.info("left out of requests: %s", said)


left_out = ToldOnce()
