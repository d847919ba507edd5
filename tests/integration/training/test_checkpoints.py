"""Folders of checkpoints: which are whole, which are deleted, and files that take the place of others."""

from __future__ import annotations

from attanchor_vlm.training import checkpoints


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path):
    for step, whole in ((5, True), (40, True), (300, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")  # Trainer's own last file, while others may still write
        if whole:
            checkpoints.mark_complete(folder, {"tau": 0.5, "keeper": None})
    torn = tmp_path / "checkpoint-300" / checkpoints.STATE_FILE
    torn.write_text('{"step": 3')
    assert [path.name for path in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-40"]
    assert checkpoints.remove_torn(tmp_path) == [tmp_path / "checkpoint-300"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-40", "checkpoint-5"]


def test_old_checkpoints_are_deleted_but_the_best(tmp_path):
    for step in (10, 20, 30, 40):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoints.mark_complete(folder, {"tau": 0.1, "keeper": None})
    checkpoints.delete_old(tmp_path, 2, str(tmp_path / "checkpoint-10"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-30", "checkpoint-40"]


def test_an_adapter_s_folders_take_the_place_of_earlier_ones(tmp_path):
    for text in ("first", "second"):

        def write(folder, text=text):
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool.jinja").write_text(text)
            (folder / "additional_chat_templates" / "tool.jinja").chmod(0o600)  # as safetensors makes files

        checkpoints.replace_files(tmp_path, write)
    (plain := tmp_path / "plain").touch()
    made = tmp_path / "additional_chat_templates" / "tool.jinja"
    assert made.stat().st_mode == plain.stat().st_mode  # as the umask says
    plain.unlink()
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["second"]
