"""Small files of every format that microgen reads, written byte by byte from the format's description."""

import json
import struct

import numpy as np

PIXEL_NM = 0.02
TIFFS = ("fei", "zeiss", "tvips", "ome", "tiled", "stack")  # of other makers and of other layouts
FORMATS = (
    "tif",
    "png",
    "jpg",
    "dm3",
    "dm4",
    "ser",
    "emd",
    "velox",
    "mrc",
    "hspy",
    "bmp",
    "atomap",
    *TIFFS,
)
ENDING = {"velox": "emd", "atomap": "hdf5", **dict.fromkeys(TIFFS, "tif")}
UNCALIBRATED = ("png", "jpg", "bmp", "atomap")  # they hold no length, or one without a unit
HOW = {"stack": {"frame": 1}}  # what `read` has to be told


def image(shape=(24, 32)):
    "Columns of a square lattice, 200 pm apart at 20 pm per pixel, with a slope so that no flip goes unseen."
    y, x = np.mgrid[: shape[0], : shape[1]]
    lattice = (1 + np.cos(2 * np.pi * y / 10)) * (1 + np.cos(2 * np.pi * x / 10))
    return (1000 * lattice + 40 * y + 7 * x).astype(np.float32)


# --- Gatan DigitalMicrograph: a tree of tags, big-endian names and sizes, little-endian values


def dm(data, pixel_nm=PIXEL_NM, unit="nm", version=4, thumbnail=True):
    "A .dm3 or .dm4 file with a thumbnail and one image (or a stack of them)."
    long = ">Q" if version == 4 else ">I"

    def word(*v):
        return b"".join(struct.pack(long, x) for x in v)

    def entry(kind, name, body):
        size = word(len(body)) if version == 4 else b""
        return struct.pack(">BH", kind, len(name)) + name.encode() + size + body

    def group(name, *tags):
        return entry(20, name, b"\1\0" + word(len(tags)) + b"".join(tags))

    def value(name, code, fmt, v):
        return entry(21, name, b"%%%%" + word(1, code) + struct.pack("<" + fmt, v))

    def text(name, s):
        return entry(21, name, b"%%%%" + word(3, 20, 4, len(s)) + s.encode("utf-16-le"))

    def array(name, code, a):
        return entry(21, name, b"%%%%" + word(3, 20, code, a.size) + a.tobytes())

    def picture(a, kind, code, step, unit, sizes):
        def axis():
            return group(
                "", value("Origin", 6, "f", 0.0), value("Scale", 6, "f", step), text("Units", unit)
            )

        calibrations = group("Calibrations", group("Dimension", *(axis() for _ in sizes)))
        dimensions = group("Dimensions", *(value("", 5, "I", n) for n in sizes))
        return group(
            "",
            group(
                "ImageData",
                calibrations,
                array("Data", code, a),
                value("DataType", 5, "I", kind),
                dimensions,
                value("PixelDepth", 5, "I", 4),
            ),
            group(
                "ImageTags",
                group("Microscope Info", value("Voltage", 6, "f", 200e3), text("Name", "sample")),
            ),
        )

    small = np.zeros((8, 8), "<u4")
    kinds = {"<f4": (2, 6), "<u2": (10, 4), "<i2": (1, 2)}
    pixels = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
    main = picture(pixels, *kinds[pixels.dtype.str], pixel_nm, unit, data.shape[::-1])
    pictures = ([picture(small, 23, 5, 1.0, "", small.shape)] if thumbnail else []) + [main]
    tree = (
        b"\1\0"
        + word(2)
        + value("InImageMode", 8, "B", 1)
        + group("ImageList", *pictures)
        + b"\0" * 8
    )
    return struct.pack(">I", version) + word(len(tree)) + struct.pack(">I", 1) + tree


# --- FEI TIA


def ser(data, pixel_m=PIXEL_NM * 1e-9, n=1):
    "A .ser file of version 0x0220 with n images, rows from the bottom up."
    kind = {"<f4": 7, "<u2": 2, "<i4": 6}[data.dtype.newbyteorder("<").str]
    body = struct.pack("<ddi", 0.0, pixel_m, 0) * 2 + struct.pack("<hii", kind, *data.shape[::-1])
    body += np.ascontiguousarray(data[::-1], data.dtype.newbyteorder("<")).tobytes()
    dimension = (
        struct.pack("<iddi", n, 0.0, 1.0, 0)
        + struct.pack("<i", 6)
        + b"Number"
        + struct.pack("<i", 0)
    )
    table = 34 + len(dimension)
    starts = [table + 16 * n + i * (len(body) + 8) for i in range(n)]
    head = struct.pack("<hhhiiiiqi", 0x4949, 0x0197, 0x0220, 0x4122, 0x4152, n, n, table, 1)
    offsets = struct.pack(f"<{n}q", *starts) + struct.pack(
        f"<{n}q", *(s + len(body) for s in starts)
    )
    return head + dimension + offsets + (body + struct.pack("<ii", 0x4152, 0)) * n


# --- MRC


def mrc(data, pixel_nm=PIXEL_NM, calibrated=True):
    "An MRC 2014 file: cell in Å, or zero when it is not calibrated."
    stack = data if data.ndim == 3 else data[None]
    n, h, w = stack.shape
    mode = {"<f4": 2, "<u2": 6, "<i2": 1}[data.dtype.newbyteorder("<").str]
    cell = [10 * pixel_nm * s if calibrated else 0.0 for s in (w, h, n)]
    head = struct.pack(
        "<10i6f3i3f", w, h, n, mode, 0, 0, 0, w, h, n, *cell, 90, 90, 90, 1, 2, 3, 0, 0, 0
    )
    head = head.ljust(208, b"\0") + b"MAP \x44\x44\0\0"
    return (
        head.ljust(1024, b"\0")
        + np.ascontiguousarray(stack, data.dtype.newbyteorder("<")).tobytes()
    )


# --- HDF5: three layouts


def hspy(path, data, pixel=PIXEL_NM, unit="nm", names=("HAADF",)):
    "HyperSpy's tree; with unit None the axes carry none."
    import h5py

    with h5py.File(path, "w") as f:
        f.attrs["file_format"], f.attrs["file_format_version"] = "HyperSpy", "3.3"
        for name in names:
            group = f.create_group(f"Experiments/{name}")
            group.create_dataset("data", data=data, chunks=True, compression="gzip")
            for i, n in enumerate(data.shape):
                axis = group.create_group(f"axis-{i}").attrs
                axis["size"], axis["offset"], axis["navigate"] = n, 0.0, i < data.ndim - 2
                axis["scale"] = pixel if i >= data.ndim - 2 else 1.0
                if unit is not None:
                    axis["units"] = unit
            group.create_group("metadata/General").attrs["title"] = name
            group.create_group("original_metadata")
    return path


def emd(path, data, pixel=PIXEL_NM, unit="[n_m]"):
    "Berkeley's EMD 0.2."
    import h5py

    with h5py.File(path, "w") as f:
        f.attrs["version_major"], f.attrs["version_minor"] = 0, 2
        group = f.create_group("data/image")
        group.attrs["emd_group_type"] = 1
        group.create_dataset("data", data=data)
        for i, n in enumerate(data.shape):
            dim = group.create_dataset(f"dim{i + 1}", data=pixel * np.arange(n))
            dim.attrs["name"], dim.attrs["units"] = "zyx"[i - data.ndim], unit
    return path


def velox(path, data, pixel_m=PIXEL_NM * 1e-9, unit="m", detectors=("HAADF",)):
    "Velox's EMD: frames last, JSON as a column of bytes."
    import h5py

    frames = data[..., None] if data.ndim == 2 else np.moveaxis(data, 0, -1)
    with h5py.File(path, "w") as f:
        for i, name in enumerate(detectors):
            about = {
                "BinaryResult": {
                    "PixelSize": {"width": str(pixel_m), "height": str(pixel_m)},
                    "PixelUnitX": unit,
                    "PixelUnitY": unit,
                    "Detector": name,
                },
                "Optics": {"AccelerationVoltage": "200000"},
            }
            text = np.zeros((4096, frames.shape[-1]), np.uint8)
            raw = json.dumps(about).encode()
            text[: len(raw)] = np.frombuffer(raw, np.uint8)[:, None]
            group = f.create_group(f"Data/Image/{i:032x}")
            group.create_dataset("Data", data=frames, chunks=(*frames.shape[:2], 1))
            group.create_dataset("Metadata", data=text)
    return path


def atomap(path, data, pixel=PIXEL_NM):
    "An atom lattice as atomap saves it: the image, and sublattices that carry its pixel size, without a unit."
    import h5py

    with h5py.File(path, "w") as f:
        f.create_dataset("image_data", data=data, chunks=True, compression="gzip")
        f.attrs["atom_lattice_type"], f.attrs["pixel_size"] = "atom_lattice", pixel
        for name in ("A_sublattice", "B_sublattice"):
            group = f.create_group(name)
            group.attrs["pixel_size"], group.attrs["tag"] = pixel, name[0]
            group.create_dataset("atom_positions", data=np.arange(8.0).reshape(4, 2))
    return path


# --- TIFF of other makers


def tiff(path, kind, data, pixel_nm=PIXEL_NM):
    "A TIFF as FEI, Zeiss, TVIPS or an OME writer make it, in deflated tiles, or as pages of a stack."
    import tifffile

    metres, how = pixel_nm * 1e-9, {}
    if kind == "fei":
        text = f"[User]\r\nDate=01/02/2020\r\n[Beam]\r\nHV=30000\r\nScan=EScan\r\n[EScan]\r\nPixelWidth={metres}\r\nPixelHeight={metres}\r\n"
        how = {"extratags": [(34682, "s", 0, text, True)]}
    elif (
        kind == "zeiss"
    ):  # the first number is the pixel size for 1024 pixels, the named one is rounded
        text = f"1\r\n0\r\n0\r\n{metres * data.shape[1] / 1024}\r\nAP_IMAGE_PIXEL_SIZE\r\nImage Pixel Size = {1e3 * pixel_nm:.1f} pm\r\n"
        how = {"extratags": [(34118, "s", 0, text, True)]}
    elif kind == "tvips":
        first = np.zeros(
            (), np.dtype([(n, t) for n, t in tifffile.TIFF.TVIPS_HEADER_V1]).newbyteorder("<")
        )
        second = np.zeros(
            (), np.dtype([(n, t) for n, t in tifffile.TIFF.TVIPS_HEADER_V2]).newbyteorder("<")
        )
        first["Version"], second["Magic"], second["PixelSizeX"], second["PixelSizeY"] = (
            2,
            0xAAAAAAAA,
            pixel_nm,
            pixel_nm,
        )
        raw = first.tobytes() + second.tobytes()
        how = {"extratags": [(37706, 1, len(raw), raw, True)]}
    elif kind == "ome":
        h, w = data.shape
        text = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'DimensionOrder="XYCZT" Type="float" SizeX="{w}" SizeY="{h}" SizeC="1" SizeZ="1" SizeT="1" PhysicalSizeX="{pixel_nm / 1e3}" '
            f'PhysicalSizeY="{pixel_nm / 1e3}"><TiffData/></Pixels></Image></OME>'
        )
        how = {"description": text.encode(), "metadata": None}
    else:
        tags = [(code, "s", 0, "nm", True) for code in (65003, 65004)] + [
            (code, "d", 1, pixel_nm, True) for code in (65009, 65010)
        ]
        how = {"extratags": tags, "photometric": "minisblack", "metadata": None}
        how |= {"tile": (16, 16), "compression": "zlib"} if kind == "tiled" else {}
        data = np.stack([data + 1, data, data + 2]) if kind == "stack" else data
    tifffile.imwrite(path, data, **how)
    return path


def write(folder, kind, data=None):
    "A good file of one format; its path."
    data = image() if data is None else data
    path = folder / f"{kind}.{ENDING.get(kind, kind)}"
    if kind in ("dm3", "dm4"):
        path.write_bytes(dm(data, version=int(kind[-1])))
    elif kind in ("ser", "mrc"):
        path.write_bytes(globals()[kind](data))
    elif kind in ("hspy", "emd", "velox", "atomap"):
        globals()[kind](path, data)
    elif kind in TIFFS:
        tiff(path, kind, data)
    elif kind == "tif":
        from microgen.io.files import write_tiff

        write_tiff(path, data, PIXEL_NM, {"sample": "made for a test"})
    else:
        from PIL import Image

        Image.fromarray((255 * data / data.max()).astype(np.uint8)).save(path, quality=95)
    return path
