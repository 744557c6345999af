"""The table of figures that `evaluate.py` prints."""

from lab.evaluation.report import Report

# figure -> (its name, digits, what it is); none of them is FID or KID, which are those of the Inception network
BY_CLASSIFIER = {
    "fd": ("FD of our classifier", 3, "samples against held-out images"),
    "kid": ("KID of our classifier", 4, "the same features"),
    "precision": ("  precision", 3, "samples among held-out images"),
    "recall": ("  recall", 3, "held-out images among samples"),
    "recognised": ("  recognised", 3, "as the class that was asked for"),
}


def table(report: Report) -> str:
    """The figures, one per line: name, value with its standard error, number of images, explanation."""
    mse, likely, swd = report["eps_mse"], report["variational_bound"], report["sliced_wasserstein"]
    near, speed, fid, kid = (report[name] for name in ("nearest_training_images", "sampling", "fid", "kid"))
    rows = [("measure", "value", "n", "")]

    def row(name: str, value: str | None, figure: Report, note: str) -> None:
        rows.append((name, value or "-", f"{figure['n']:,}" if value else "-", note if value else figure["reason"]))

    def number(figure: Report, digits: int, spread: str | None = None) -> str | None:
        if figure["value"] is None:
            return None
        return f"{figure['value']:,.{digits}f}" + (f" +- {figure[spread]:.{digits}f}" if spread else "")

    row("held-out eps-MSE", number(mse, 5), mse, "frozen bank")
    if "memory_off" in mse:
        row("  memory off", f"{mse['memory_off']:.5f}", mse, "every step starts from a state of zeros")
    for part in mse["bins"]:
        if part["n"]:
            row(f"  t {part['t'][0]}..{part['t'][1]}", number(part, 5), part, "")
    row("variational bound", number(likely, 4, "standard_error"), likely, "bits/dim, held out, +- standard error")
    if swd["value"] is None:
        row("sliced Wasserstein", None, swd, "")
    else:
        for level in swd["value"]:
            note = f"x 1e3, samples against held-out images; training images: {swd['floor'][level]:.2f}"
            row(f"sliced Wasserstein {level}", f"{swd['value'][level]:.2f}", swd, note)
    if report["classifier"].get("reason"):
        row("by our classifier", None, report["classifier"] | {"value": None}, "")
    else:
        for name, (label, digits, note) in BY_CLASSIFIER.items():
            if name in report["classifier"]:
                found = report["classifier"][name]
                note += f", +- 95 % interval; training images: {number(found['floor'], digits, 'interval')}"
                row(label, number(found, digits, "interval"), found, note)
    row("FID", number(fid, 2), fid, f"against {fid.get('n_reference', 0):,} training images, {fid.get('library')}")
    if kid["value"] is not None:
        row("KID", number(kid, 5, "standard_deviation"), kid, "+- standard deviation over subsets")
    scale = near["held_out"]
    note = f"median distance in 8-bit levels; held-out images: {scale['value']:.1f}"
    row("nearest training image", number(near, 1), near, note)
    for point in report.get("ode_work", {"points": []})["points"]:
        steps = "its own" if point["ode_steps"] is None else "/".join(map(str, point["ode_steps"]))
        note = f"eps-MSE, {point['multiply_adds'] / 1e6:,.1f} M multiply-adds" + ", as trained" * point["as_trained"]
        row(f"  {point['solver']} {steps}", number(point, 5), report["ode_work"], note)
    row("sampling", number(speed, 1), speed, f"images/s, {speed['sampler']}, {speed['steps']} network calls per image")
    row("  its cost", f"{speed['multiply_adds_per_image'] / 1e9:.2f}", speed, "billion multiply-adds per image drawn")
    widths = [max(len(cells[i]) for cells in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)
