"""`activation_checkpointing` and its older name `gradient_checkpointing`, in files and flags, with any transformers."""

import pytest
import transformers

from fusedalign.trl.arguments import method_parser, parse, read_words

OLD, NEW = "gradient_checkpointing", "activation_checkpointing"
RENAMED = NEW in transformers.TrainingArguments.__dataclass_fields__


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return ["--config", str(path), "--output_dir", str(tmp_path / "out")]

    return write


@pytest.mark.parametrize("in_file", [OLD, NEW])
@pytest.mark.parametrize("flag", [OLD, NEW])
@pytest.mark.parametrize("value", [True, False])
def test_a_flag_wins_over_the_file_under_either_name(config, in_file, flag, value):
    words = [*config(f"{in_file}: {not value}\n".lower()), f"--{flag}", str(value).lower()]
    assert parse("dpo", words).training.gradient_checkpointing is value
    assert parse("dpo", words[:-2]).training.gradient_checkpointing is not value
    if RENAMED:
        assert parse("dpo", words).training.activation_checkpointing is value


def test_the_default_is_trls(config):
    assert parse("dpo", config("seed: 1\n")).training.gradient_checkpointing is True


@pytest.mark.parametrize("flag", [f"--no_{OLD}", f"--{OLD.replace('_', '-')}=false", f"--{NEW}=false"])
def test_other_spellings_of_off_win_over_the_file(config, flag):
    assert parse("sft", [*config(f"{NEW}: true\n"), flag]).training.gradient_checkpointing is False


@pytest.mark.parametrize("name", [OLD, NEW])
def test_its_options_have_both_names(config, name):
    words = config(f"{name}_kwargs: {{use_reentrant: true}}\n")
    assert parse("dpo", words).training.gradient_checkpointing_kwargs == {"use_reentrant": True}


def test_both_names_in_one_file_are_refused(config):
    with pytest.raises(ValueError, match=r"checkpointing in .*c\.yaml must be given once, got it under its older name"):
        read_words(method_parser("dpo"), config(f"{NEW}: true\n{OLD}: false\n"))
