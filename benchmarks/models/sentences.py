"""English sentences of very different lengths, so that a batch of them really has padding."""

SENTENCES = (
    "The train to the coast leaves at nine.",
    "Rain again.",
    "She kept every letter her brother had sent from the north, tied with the blue ribbon that "
    "once held her school medals together.",
    "A small bakery opened on our street last spring.",
    "Which of these roads leads to the old bridge?",
    "The committee has postponed its decision until the engineers have checked the foundations "
    "of the dam, because the first survey was made in a very dry year and the second one was "
    "never finished.",
    "Bread, cheese and two apples.",
    "The doctor listened to his heart for a long time before she said anything.",
    "Prices of copper fell for the third week in a row.",
    "My grandfather repaired clocks.",
    "When the lights came back, everyone in the theatre was still sitting quietly in the dark, "
    "as if the play had gone on without the actors.",
    "The new library stays open until midnight during the examinations, and students may take "
    "their coffee inside as long as the cups have lids.",
    "Nobody answered the telephone.",
    "The physician heard the patient's heartbeat for several minutes and then spoke.",
    "A bakery has recently opened near our house.",
    "He sold the boat, although it had been in the family for eighty years, to a young couple "
    "who wanted to sail around the island before the winter storms began, and he never asked "
    "where they went after that.",
)


def paragraphs(count: int) -> list[str]:
    """Texts of growing length, the last one all sentences in a row."""
    total = len(SENTENCES)
    lengths = [4 + (total - 4) * (n + 1) // count for n in range(count)]
    return [
        " ".join(SENTENCES[(3 * n + i) % total] for i in range(length))
        for n, length in enumerate(lengths)
    ]
