"""--classes: names in any spelling that a file system allows, and numbers, of which none is mistaken for a name."""

import unicodedata

import pytest

from diffusion.scheduler import DDPMScheduler
from lab.drawing import Drawn, chosen_turns, in_turns
from liquid_diffusion import TrueLiquidDiffusionModel
from runtime.errors import UserError
from runtime.names import chosen

FISH = ["tench, Tinca tinca", "goldfish, Carassius auratus", "cat ", "Dog", unicodedata.normalize("NFD", "café"), "犬"]


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("tench, Tinca tinca", [0]),
        ("goldfish, Carassius auratus,tench, Tinca tinca,cat ", [1, 0, 2]),
        (" tench, Tinca tinca , Dog", [0, 3]),
        ("cat", [2]),
        ("dog,DOG, Dog", [3, 3, 3]),
        (unicodedata.normalize("NFC", "café"), [4]),
        (unicodedata.normalize("NFD", "café"), [4]),
        ("CAFÉ", [4]),
        ("犬,5", [5, 5]),
        ("0,1, 2", [0, 1, 2]),
        ("index:3,name:cat,name:tench, Tinca tinca", [3, 2, 0]),
    ],
)
def test_a_class_is_known_in_any_usual_spelling(text, numbers):
    assert chosen(text, FISH) == numbers


def test_a_stricter_spelling_goes_before_a_looser_one():
    assert chosen("cat,Cat,cat ,CAT ", ["Cat", "cat", "cat ", "CAT "]) == [1, 0, 2, 3]
    assert chosen("index:0,1", ["a", "index:0"]) == [1, 1]
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert chosen(f"{nfd},{nfc}", [nfc, nfd]) == [1, 0]


@pytest.mark.parametrize(
    "text, names, words",
    [
        ("0,1", ["1", "10", "2"], ["'1'", "name:1", "index:1", "'10'"]),
        ("CAT", ["Cat", "cat"], ["name:Cat", "name:cat"]),
        ("CAT", ["cat ", "cat  "], ["index:0", "index:1"]),
        ("a,b", ["a", "b", "a,b"], ["index:2", "name:"]),
    ],
)
def test_what_may_be_two_classes_is_refused_with_how_to_say_each(text, names, words):
    with pytest.raises(ValueError) as refusal:
        chosen(text, names)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_number_is_taken_where_it_means_one_class():
    assert chosen("0,name:1,index:1,10,2", ["1", "10", "2"]) == [0, 0, 1, 1, 2]
    assert chosen("0,9", [str(i) for i in range(10)]) == [0, 9]
    assert chosen("name:a,name:b", ["a", "b", "a,b"]) == [0, 1]


@pytest.mark.parametrize("text", ["", "hors", "cat,", "7", "-1", "01", "index:7", "name:0", "tench", "index:"])
def test_what_is_no_class_is_refused_and_a_long_list_is_not_printed(text):
    with pytest.raises(ValueError, match="no class"):
        chosen(text, FISH)
    with pytest.raises(ValueError, match=r"but 'horse'.* and 989 more") as refusal:
        chosen("hors", [f"class {i}" for i in range(1000)] + ["horse"])
    assert len(str(refusal.value)) < 300


def test_the_flag_is_named_and_only_the_model_s_classes_are_chosen():
    one = Drawn(TrueLiquidDiffusionModel(num_classes=2), DDPMScheduler(), {"classes": ["a", "b", "c"]})
    assert chosen_turns("b,0", one) == [1, 0] and chosen_turns(None, one) == [0, 1]
    assert in_turns([1, 0], 5).tolist() == [1, 0, 1, 0, 1] and in_turns([], 5) is None
    with pytest.raises(UserError, match="--classes: no class 'c'"):
        chosen_turns("c", one)
