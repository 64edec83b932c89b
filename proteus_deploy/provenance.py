"""A mark in an mp4 or PNG that says that a machine made it, where tools look for it.

An XMP packet (ISO 16684-1) where Adobe's XMP specification, part 3, has it: for MPEG-4 in a `uuid` box at the
end of the file, for a PNG in a text chunk (reference_portrait.py). It holds IPTC's digital source type
"trainedAlgorithmicMedia", the term that C2PA's actions use too. It isn't signed: it informs, and proves
nothing.
"""

from __future__ import annotations

import re
import struct
import uuid
from pathlib import Path
from xml.sax.saxutils import quoteattr

from proteus_deploy.errors import InputError

__all__ = ["GENERATED", "mark_generated", "source_type", "xmp_packet"]

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

_XMP = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmp:CreatorTool={tool} Iptc4xmpExt:DigitalSourceType="{kind}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
_KIND = re.compile(rb'Iptc4xmpExt:DigitalSourceType="([^"]*)"')


def xmp_packet() -> str:
    """The mark itself."""
    from proteus_deploy import __version__

    return _PACKET.format(tool=quoteattr(f"proteus-deploy {__version__}"), kind=GENERATED)


def mark_generated(path: str | Path) -> None:
    """Append the mark to an mp4, in place. Raises InputError for a file that is no mp4 or has a mark."""
    if source_type(path) is not None:
        raise InputError(f"{path} is marked already")
    packet = xmp_packet().encode()
    with Path(path).open("ab") as stream:
        stream.write(struct.pack(">I", 8 + len(_XMP) + len(packet)) + b"uuid" + _XMP + packet)


def source_type(path: str | Path) -> str | None:
    """IPTC's digital source type that the file states; None where it states none.

    Raises InputError for a file that is no mp4, or is cut off.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as stream:
        at = 0
        while at < max(size, 1):  # an empty file has no first box either
            stream.seek(at)
            length, kind = struct.unpack(">I4s", stream.read(8).ljust(8, b"\0"))
            header = 8
            if length == 1:  # a box beyond 4 GiB
                (length,), header = struct.unpack(">Q", stream.read(8).ljust(8, b"\0")), 16
            length = length or size - at
            if length < header or at + length > size or (at == 0 and kind != b"ftyp"):
                raise InputError(f"{path} is no whole mp4: the box at byte {at} doesn't fit")
            if kind == b"uuid" and stream.read(len(_XMP)) == _XMP:
                found = _KIND.search(stream.read(length - header - len(_XMP)))
                return found[1].decode("utf-8", "replace") if found else None
            at += length
    return None
