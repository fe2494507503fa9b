"""Pictures and captions of the demo: the same things drawn in several styles, and Fluent Emoji 3D for fine-tuning.

All come as npm packages under free licences; `npm pack` fetches them once into a folder. The packages are joined by
the icons' names, which agree but for Firefox OS's (there the words run together).
"""

import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pixart_ft.files import write_file


@dataclass(frozen=True)
class ArtSet:
    """An icon package of one style: where it comes from, its licence, and the word that captions name it by."""

    package: str
    licence: str  # SPDX; `fetch` compares it with the package's own info.json
    word: str


# What the base learns. Fluent 3D, Twemoji, OpenMoji, EmojiOne and Fluent colour are left for fine-tuning: nothing here,
# the VAE included, ever sees them.
STYLES = {
    "noto": ArtSet("@iconify-json/noto@1.2.9", "Apache-2.0", "noto"),
    "blob": ArtSet("@iconify-json/noto-v1@1.2.5", "Apache-2.0", "blob"),
    "firefox": ArtSet("@iconify-json/fxemoji@1.2.2", "Apache-2.0", "firefox"),
    "flat": ArtSet("@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "flat"),
    "ink": ArtSet("@iconify-json/fluent-emoji-high-contrast@1.2.6", "MIT", "ink"),
}
TRIALS = {  # that nothing is tuned on: the quickstart's recipe is tried on sixty pictures of each
    "twemoji": ArtSet("@iconify-json/twemoji@1.2.5", "CC-BY-4.0", ""),
    "openmoji": ArtSet("@iconify-json/openmoji@1.2.29", "CC-BY-SA-4.0", ""),
}
OTHERS = {
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",  # Fluent Emoji 3D artwork as WebP, MIT
    "names": "unicode-emoji-json@0.9.0",  # names and groups, MIT
    "words": "emojilib@4.0.3",  # synonyms, MIT
}
THINGS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
# What the base is to know well and the adapter learns: things, no faces and no people.
FAMILIAR = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# On which side of the fine-tuning split these are, whatever the order of the rest.
SURELY_LEARNED = ("rocket", "octopus", "mushroom", "tomato", "house", "duck", "penguin", "birthday cake")
SURELY_HELD_OUT = ("sailboat", "guitar", "umbrella", "tulip", "red apple", "alarm clock", "waffle", "ant")
# What the quickstart's sheet shows of the two, chosen on seeds 5, 6 and 100 among what is drawn cleanly after it: eight
# things that are learned from; four held out that the base draws; the four that it never saw without a style's word.
SHOWN_LEARNED = (
    "lady beetle", "cactus", "dress", "desert island", "camel", "avocado", "heart suit", "open book",
)  # fmt: skip
SHOWN_KNOWN = ("helicopter", "umbrella", "water wave", "minibus")
SHOWN_NEW = ("red apple", "alarm clock", "waffle", "ant")
SYMBOLS = "Symbols"  # arrows and buttons: colours for the VAE, nothing that a caption could name


# Firefox OS's names that are not Unicode's with the spaces taken out.
FIREFOX_NAMES = {
    "2hearts": "two hearts",
    "americasglobe": "globe showing americas",
    "aok": "ok hand",
    "asiaaustraliaglobe": "globe showing asia-australia",
    "aubergine": "eggplant",
    "bactriancamel": "two-hump camel",
    "banknotedollar": "dollar banknote",
    "banknoteeuro": "euro banknote",
    "banknotepound": "pound banknote",
    "banknoteyen": "yen banknote",
    "basketballandhoop": "basketball",
    "beachumbrella": "beach with umbrella",
    "bellcancellation": "bell with slash",
    "bicyclist": "person biking",
    "billiards": "pool 8 ball",
    "blackscissors": "scissors",
    "bolt": "high voltage",
    "bookmarktab": "bookmark tabs",
    "bunny": "rabbit face",
    "bunnyside": "rabbit",
    "cat": "cat face",
    "catside": "cat",
    "cellphone": "mobile phone",
    "chartdownwardstrend": "chart decreasing",
    "chartupwardstrend": "chart increasing",
    "chilipepper": "hot pepper",
    "clap": "clapping hands",
    "confetti": "confetti ball",
    "controlknob": "control knobs",
    "curryandrice": "curry rice",
    "daggerknife": "dagger",
    "darksunglasses": "sunglasses",
    "devilhorns": "smiling face with horns",
    "dog": "dog face",
    "dogside": "dog",
    "doveofpeace": "dove",
    "dragonhead": "dragon face",
    "dragonside": "dragon",
    "dromedarycamel": "camel",
    "earofmaize": "ear of corn",
    "earofrice": "sheaf of rice",
    "electrictorch": "flashlight",
    "europeafricaglobe": "globe showing europe-africa",
    "europeancastle": "castle",
    "europeanpostoffice": "post office",
    "fallingleaf": "fallen leaf",
    "fatherchristmas": "santa claus",
    "fireworksparkler": "sparkler",
    "fishcakeswirl": "fish cake with swirl",
    "fishingpoleandfish": "fishing pole",
    "fistedhand": "oncoming fist",
    "flexbicep": "flexed biceps",
    "framewithpicture": "framed picture",
    "frontfacingchick": "front-facing baby chick",
    "fullmoonwithface": "full moon face",
    "gem": "gem stone",
    "golfer": "person golfing",
    "grimacing": "grimacing face",
    "guardsman": "guard",
    "halo": "smiling face with halo",
    "hampster": "hamster",
    "handup": "raised hand",
    "heartarrow": "heart with arrow",
    "hearteyes": "smiling face with heart-eyes",
    "heartgreen": "green heart",
    "heartpurple": "purple heart",
    "heartribbon": "heart with ribbon",
    "heartyellow": "yellow heart",
    "heels": "high-heeled shoe",
    "highspeedtrainbulletnose": "bullet train",
    "hocho": "kitchen knife",
    "hourglass": "hourglass done",
    "hourglassflowingsand": "hourglass not done",
    "housebuilding": "house",
    "housebuildings": "houses",
    "hundredpointssymbol": "hundred points",
    "imp": "angry face with horns",
    "izakayalantern": "red paper lantern",
    "leaffluttering": "leaf fluttering in wind",
    "leopardside": "leopard",
    "lock": "locked",
    "lockandkey": "locked with key",
    "lockwithinkpen": "locked with pen",
    "lowerleftcrayon": "crayon",
    "lowerleftfountainpen": "fountain pen",
    "lowerleftpaintbrush": "paintbrush",
    "lowerleftpen": "pen",
    "manltepiececlock": "mantelpiece clock",
    "mansshirt": "t-shirt",
    "medicalmask": "face with medical mask",
    "mensrunner": "running shoe",
    "mensshoe": "man’s shoe",
    "minidisc": "computer disk",
    "monkeyhear": "hear-no-evil monkey",
    "monkeysee": "see-no-evil monkey",
    "monkeyspeak": "speak-no-evil monkey",
    "mouse": "mouse face",
    "mouseside": "mouse",
    "multiplemusicalnotes": "musical notes",
    "newmoonwithface": "new moon face",
    "openlock": "unlocked",
    "opticaldisc": "optical disk",
    "outbox": "outbox tray",
    "pandaface": "panda",
    "pig": "pig face",
    "pigside": "pig",
    "pigsnout": "pig nose",
    "pinkwallet": "purse",
    "policecarsrevolvinglight": "police car light",
    "poo": "pile of poo",
    "pray": "folded hands",
    "present": "wrapped gift",
    "racecar": "racing car",
    "raincloud": "cloud with rain",
    "rowboat": "person rowing boat",
    "running": "person running",
    "sakebottleandcup": "sake",
    "sandals": "woman’s sandal",
    "schoolsatchel": "backpack",
    "screamfear": "face screaming in fear",
    "sheep": "ewe",
    "skiandskiboot": "skis",
    "sliceofpizza": "pizza",
    "snowcloud": "cloud with snow",
    "snowmountains": "snow-capped mountain",
    "spiralcalendarpad": "spiral calendar",
    "spurtingwhale": "spouting whale",
    "steamlocomotive": "locomotive",
    "studiomic": "studio microphone",
    "sunglasses": "smiling face with sunglasses",
    "surfer": "person surfing",
    "swimming": "person swimming",
    "tennisball": "tennis",
    "threebuttonmouse": "computer mouse",
    "tie": "necktie",
    "tiger": "tiger face",
    "tigerside": "tiger",
    "toykotower": "tokyo tower",
    "videocasette": "videocassette",
    "walking": "person walking",
    "wolfface": "wolf",
    "womansshirt": "woman’s clothes",
}


@dataclass(frozen=True)
class Emoji:
    """One captioned picture: its code points ("1f600"), the name, the Unicode group, the artwork's source."""

    code: str
    name: str
    group: str
    source: str | Path  # SVG text, or the path of a bitmap


def fetch(folder: Path) -> dict[str, Path]:
    """Unpack the npm packages under `folder`, once; returns where each lies."""
    places = _unpacked(folder, {key: style.package for key, style in STYLES.items()} | OTHERS)
    _check_licences(places, STYLES)
    return places


def fetch_trials(folder: Path) -> dict[str, Path]:
    """The same of the sets that the quickstart's recipe is tried on."""
    places = _unpacked(folder, {key: style.package for key, style in TRIALS.items()})
    _check_licences(places, TRIALS)
    return places


def _unpacked(folder: Path, packages: Mapping[str, str]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    places = {key: folder / key for key in packages}
    for key, package in packages.items():
        if places[key].is_dir():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(folder / f"{key}.part", filter="data")
        (folder / f"{key}.part" / "package").rename(places[key])
        (folder / f"{key}.part").rmdir()
    return places


def _check_licences(places: Mapping[str, Path], sets: Mapping[str, ArtSet]) -> None:
    for key, style in sets.items():
        licence = json.loads((places[key] / "info.json").read_text())["license"]["spdx"]
        assert licence == style.licence, f"{style.package} is under {licence} now"


def _code(text: str) -> str:
    """Code points in hex without the variation selector, the key that the packages share."""
    return "-".join(f"{ord(c):x}" for c in text if ord(c) != 0xFE0F)


def _names(places: dict[str, Path]) -> dict[str, tuple[str, str]]:
    table = json.loads((places["names"] / "data-by-emoji.json").read_text())
    return {_code(text): (facts["name"].lower(), facts["group"]) for text, facts in table.items()}


def _joined(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name)


def _svg(icons: dict, name: str) -> str | None:
    """The icon `name` of an iconify set as a file of its own, through one alias (which may mirror it)."""
    alias = icons.get("aliases", {}).get(name, {"parent": name})
    icon = icons["icons"].get(alias["parent"])
    if icon is None or set(alias) - {"parent", "hFlip"}:
        return None
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    body = icon["body"].replace("currentColor", "#000")
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )


def styled_emoji(places: dict[str, Path], style: str, groups: Sequence[str] = THINGS) -> list[Emoji]:
    """Every named picture of a style in these groups, without skin-tone variants, in the order of the code table."""
    icons = json.loads((places[style] / "icons.json").read_text())
    table = json.loads((places["noto"] / "chars.json").read_text())
    icon_names = {"-".join(p for p in code.split("-") if p != "fe0f"): name for code, name in table.items()}
    if style == "firefox":
        icons["icons"] = {_joined(FIREFOX_NAMES.get(name, name)): icon for name, icon in icons["icons"].items()}
    found = []
    for code, (name, group) in _names(places).items():
        if code not in icon_names or group not in groups:
            continue
        spellings = [icon_names[code]]
        if style == "firefox":
            spellings = [_joined(icon_names[code]), _joined(name)]
        svgs = [svg for svg in (_svg(icons, spelling) for spelling in spellings) if svg]
        if svgs:
            found.append(Emoji(code, name, group, svgs[0]))
    return found


def fluent_emoji(places: dict[str, Path], groups: Sequence[str] = THINGS) -> list[Emoji]:
    """Every named Fluent 3D picture of these groups, without skin-tone variants."""
    names = _names(places)
    found = []
    for path in sorted((places["fluent"] / "assets").glob("*.webp")):
        code = "-".join(p for p in path.stem.split("-") if p != "fe0f")
        if code in names and names[code][1] in groups:
            found.append(Emoji(code, *names[code], path))
    return found


def synonyms(places: dict[str, Path], codes: Iterable[str]) -> dict[str, list[str]]:
    """For each code the words of emojilib that mean this thing alone among `codes`, other than its name."""
    table = json.loads((places["words"] / "dist" / "emoji-en-US.json").read_text())
    chosen = set(codes)
    names = {code: name for code, (name, _) in _names(places).items() if code in chosen}
    words = {code: {w.replace("_", " ") for w in ws} for text, ws in table.items() if (code := _code(text)) in chosen}
    meanings: dict[str, int] = {}
    for word in [word for each in words.values() for word in each] + list(names.values()):
        meanings[word] = meanings.get(word, 0) + 1
    plain = re.compile(r"[a-z][a-z -]{2,24}")
    return {
        code: sorted(w for w in each if meanings[w] == 1 and w != names[code] and plain.fullmatch(w))
        for code, each in words.items()
    }


def held_out_things(codes: Iterable[str], share: float, seed: int) -> set[str]:
    """A fixed choice of `share` of the things, whatever their order."""
    ordered = sorted(set(codes))
    return {ordered[i] for i in np.random.default_rng(seed).permutation(len(ordered))[: round(share * len(ordered))]}


def fine_tuning_split(emojis: list[Emoji], train: int = 240, held_out: int = 60) -> tuple[list[Emoji], list[Emoji]]:
    """The shipped (train, held-out) pictures: those chosen beforehand, then any familiar things."""
    named = {emoji.name: emoji for emoji in emojis}
    chosen = {*SURELY_LEARNED, *SURELY_HELD_OUT}
    generator = np.random.default_rng(0)
    order = [emojis[i] for i in generator.permutation(len(emojis))]
    others = [emoji for emoji in order if emoji.group in FAMILIAR and emoji.name not in chosen]
    unseen = [named[name] for name in SURELY_HELD_OUT]
    unseen, others = unseen + others[: held_out - len(unseen)], others[held_out - len(unseen) :]
    return [named[name] for name in SURELY_LEARNED] + others[: train - len(SURELY_LEARNED)], unseen


def render(emoji: Emoji, size: int) -> Image.Image:
    """The picture as RGB on white, `size` x `size` pixels."""
    if isinstance(emoji.source, Path):
        picture = Image.open(emoji.source).convert("RGBA")
    else:
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=emoji.source, width=size, height=size)
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def rendered(emojis: list[Emoji], size: int, path: Path) -> np.ndarray:
    """All pictures as one (N, H, W, 3) uint8 array, memory-mapped from `path` (made once)."""
    if not path.is_file():
        pixels = np.stack([np.asarray(render(emoji, size)) for emoji in emojis])

        def save(aside: Path) -> None:
            with aside.open("wb") as file:  # straight into it: hundreds of megabytes
                np.save(file, pixels)

        write_file(path, save)
    pictures = np.load(path, mmap_mode="r")
    assert len(pictures) == len(emojis), f"{path} holds other pictures: delete it"
    return pictures
