"""What a training, and a push, say of the Hub: the same keys. No torch here."""

from typing import Annotated

from pydantic import Field

from pixart_ft.config.reading import Section

Word = Annotated[str, Field(min_length=1, max_length=100)]
REPO = "owner/name of the repository on the Hub; made where there is none"


class Publication(Section):
    """How a result is shown on the Hub."""

    private: bool = Field(False, description="a repository that is made is yours alone to see")
    revision: str | None = Field(None, description="branch of the repository that it goes to; null = main")
    base: str | None = Field(None, description="Hub id of the base, where it was trained on a folder of this machine")
    license: str | None = Field(None, description="of the result, as the Hub names it, such as apache-2.0")
    tags: tuple[Word, ...] = Field((), description="words to find it by, beside those that follow from the run")
    trigger_words: tuple[Word, ...] = Field((), description="words of a prompt that call up what it learned")
    show_prompts: bool = Field(False, description="show the prompts of the samples, which may be captions")


class Hub(Publication):
    """where the result goes when the run has ended"""

    repo: str | None = Field(None, description=f"{REPO}; null = nowhere")
