# Draws Vega-Lite with vl-convert for whoever holds the other ends of standard input and output. A request is a line of
# JSON; so is its answer, followed by as many bytes as it says:
#   {"spec": ..., "ppi": 144}   {"svg": 1200, "png": 3400, "pdf": 5600}
#   {"javascript": true}        {"javascript": 900000}
#   {"version": true}           {"version": 3}
#   anything that fails         {"error": "one line"}
# No file is read or written, so that nothing is left behind where the other side ends.
import sys

sys.path = [folder for folder in sys.path if folder]  # a file beside the user's results is no module of ours
import json
import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
import vl_convert


def newest_version():
    versions = [v for v in vl_convert.get_vegalite_versions() if v.startswith("6.")]
    if not versions:
        raise RuntimeError(f"vl-convert {vl_convert.__version__} does not know Vega-Lite 6; install 1.9 or newer")
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


def answer(request):
    version = newest_version()
    if request.get("version"):
        return {"version": version.encode()}
    if request.get("javascript"):
        return {"javascript": vl_convert.javascript_bundle(vl_version=version).encode()}
    svg = vl_convert.vegalite_to_svg(request["spec"], vl_version=version)
    return {"svg": svg.encode(), "png": vl_convert.svg_to_png(svg, ppi=request["ppi"]), "pdf": vl_convert.svg_to_pdf(svg)}


for line in sys.stdin.buffer:
    try:
        parts = answer(json.loads(line))
        head = {name: len(content) for name, content in parts.items()}
    except Exception as error:
        parts = {}
        head = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n")
    for content in parts.values():
        sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
