"""Default texts for checks and calibration: prose, code, and one shorter than any window."""

PROMPTS = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the supply boat finally rounded the point. "
    "He counted the crates as they came up the steps: flour, lamp oil, two boxes of tinned fruit, and a parcel "
    "wrapped in brown paper with his name written on it in a hand that he did not know. The boatman would not stay "
    "for tea. A storm was coming from the south-west, he said, and he meant to be home before it broke. So the keeper "
    "carried everything inside alone, lit the stove, put the parcel on the table and sat looking at it while the wind "
    "rose, until the first rain struck the glass and it was time to climb the stairs again.",
    "def fibonacci(n: int) -> list[int]:\n    numbers = [0, 1]\n    while len(numbers) < n:\n"
    "        numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]\n\n\n# The first ten are\n"
    "# 0, 1, 1, 2, 3, 5, 8, 13, 21, 34; print them, then their sum, which is 88, and check it against n = 10.\n",
    "Water boils at 100 degrees",
)
