import compare


def test_the_table(run, common, tmp_path, capsys, monkeypatch):
    rows = [row for row in compare.ROWS if row[0] not in ("online", "labels alone")]
    few = [compare.ROWS[0], *rows[1:3], rows[-1], compare.ROWS[-1]]
    monkeypatch.setattr(compare, "ROWS", few)
    command = [*common, "--steps=2", "--seeds=2", "--windows=9", "--layers=0,3"]
    command += ["--output", tmp_path]
    run(compare, *command)
    table = capsys.readouterr().out.split("standard deviation of 2 seeds:")[1]
    for name, size in [
        ("online", "-"),
        ("top-8, tail bucket", "33"),
        ("top-8, renormalised", "33"),
        ("sampled 64", "128"),
        ("labels alone", "-"),
    ]:
        (line,) = (x for x in table.splitlines() if x.startswith(f"  {name}  "))
        assert line.split(name)[1].split()[0] == size
        assert line.count("±") == 3 and "nan" not in line
    runs = [
        next((tmp_path / name / "seed-0").glob("*/metrics.csv")) for name, *_ in few
    ]
    assert len({path.read_bytes() for path in runs}) == len(few)  # all differ
    run(compare, *command)
    assert capsys.readouterr().out.split("2 seeds:")[1] == table  # no work is repeated
