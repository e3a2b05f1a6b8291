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
import struct
import zlib

signal.signal(signal.SIGINT, signal.SIG_DFL)
import vl_convert

LARGE = 500_000  # bytes of a PNG, from which on it is packed again


def newest_version():
    versions = [v for v in vl_convert.get_vegalite_versions() if v.startswith("6.")]
    if not versions:
        raise RuntimeError(f"vl-convert {vl_convert.__version__} does not know Vega-Lite 6; install 1.9 or newer")
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


def smaller(png):
    """A PNG with its pixels packed harder: vl-convert packs them for speed, and tall figures come to megabytes."""
    chunks = []
    pixels = b""
    at = 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at:at + 4], "big")
        if png[at + 4:at + 8] == b"IDAT":
            pixels += png[at + 8:end - 4]
        else:
            chunks.append(png[at:end])
        at = end
    content = b"IDAT" + zlib.compress(zlib.decompress(pixels), 6)
    chunks.insert(-1, struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content)))
    return png[:8] + b"".join(chunks)


def answer(request):
    version = newest_version()
    if request.get("version"):
        return {"version": version.encode()}
    if request.get("javascript"):
        return {"javascript": vl_convert.javascript_bundle(vl_version=version).encode()}
    svg = vl_convert.vegalite_to_svg(request["spec"], vl_version=version)
    png = vl_convert.svg_to_png(svg, ppi=request["ppi"])
    if len(png) > LARGE:
        png = smaller(png)
    return {"svg": svg.encode(), "png": png, "pdf": vl_convert.svg_to_pdf(svg)}


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
