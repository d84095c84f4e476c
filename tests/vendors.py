"""Small files of the makers of SEMs, detectors and simulations, written byte by byte from what is known of each format."""

import hashlib
import json
import struct
from base64 import b64encode

import numpy as np

PIXEL_NM = 0.02
METRES = PIXEL_NM * 1e-9
DIFFRACTION = ("cbf", "smv", "dectris")  # they state the size of a pixel as a scattering vector
UNCALIBRATED = (*DIFFRACTION, "mib")
ENDING = {
    "npy": "npy",
    "cbf": "cbf",
    "smv": "img",
    "mib": "mib",
    "dectris": "h5",
    "prismatic": "emd",
    "py4dstem": "h5",
    **dict.fromkeys(
        ("tescan", "tescan_hdr", "hitachi", "jeol", "helios", "phenom", "titan", "sightx", "sis"),
        "tif",
    ),
}
VENDORS = tuple(ENDING)


# --- What the makers write


def tescan_text(pixel_m=METRES):
    "The lines of a TESCAN header."
    return (
        "[MAIN]\r\nCompany=TESCAN\r\nDevice=MIRA3\r\nMagnification=160000.0\r\n"
        f"PixelSizeX={pixel_m!r}\r\nPixelSizeY={pixel_m!r}\r\n[SEM]\r\nHV=15000.0\r\nWD=0.0059\r\n"
    )


def tescan_tag(pixel_m=METRES):
    "Tag 50431: a small picture, then blocks of text, each with its type and length."
    main, sem = tescan_text(pixel_m).replace("[MAIN]\r\n", "").split("[SEM]\r\n")
    picture = b"\xff\xd8\xff\xe0" + bytes(range(64)) + b"\xff\xd9"
    blocks = [(1, picture), (2, main.encode()), (3, sem.encode())]
    return b"".join(struct.pack("<HI", kind, len(body)) + body for kind, body in blocks)


def hitachi_text(columns, pixel_nm=PIXEL_NM):
    "NAME.txt of a Hitachi SEM."
    return (
        "[SemImageFile]\r\nInstructName=SU8230\r\nSerialNumber=8230-01\r\nImageName=image.tif\r\n"
        f"DataSize={columns}x{columns * 3 // 4}\r\nPixelSize={pixel_nm}\r\nMagnification=10000\r\n"
        "AcceleratingVoltage=15000 Volt\r\n"
    )


def jeol_text(columns, bar_pixels=5000, marker="100nm"):
    "NAME.txt of a JEOL SEM."
    return (
        "$CM_FORMAT JEOL/SEM\n$CM_VERSION 1.0\n$CM_INSTRUMENT JSM-7800F\n$CM_MAG 5000\n"
        f"$CM_FULL_SIZE {columns} {columns * 3 // 4}\n"
        f"$$SM_MICRON_BAR {bar_pixels}\n$$SM_MICRON_MARKER {marker}\n$$SM_WD 10.0\n"
    )


def helios_text(columns, pixel_m=METRES):
    "Tag 34682 of a Helios: the pixel, and the width of the field."
    return (
        "[User]\r\nDate=03/12/2019\r\nTime=10:22:13 AM\r\n\r\n[System]\r\nType=DualBeam\r\nSystemType=Helios G4 UX\r\n"
        "\r\n[Beam]\r\nHV=5000\r\nBeam=EBeam\r\nScan=EScan\r\n\r\n[EBeam]\r\nSource=FEG\r\nHV=5000\r\nWD=0.00412\r\n"
        f"\r\n[Scan]\r\nInternalScan=true\r\nDwelltime=3e-006\r\nPixelWidth={pixel_m!r}\r\nPixelHeight={pixel_m!r}\r\n"
        f"HorFieldsize={pixel_m * columns!r}\r\n\r\n[Detectors]\r\nNumber=1\r\nName=TLD\r\nMode=SE\r\n"
    )


def phenom_xml(pixel_nm=PIXEL_NM):
    "Tag 34683 as Phenom writes it."
    length = f"{pixel_nm / 1e3:.12f}"
    return (
        '<?xml version="1.0"?><FeiImage><databarHeight>64</databarHeight>'
        f'<pixelWidth unit="um">{length}</pixelWidth><pixelHeight unit="um">{length}</pixelHeight>'
        "<instrument><edition>G4 Phenom ProX</edition></instrument></FeiImage>"
    )


def titan_xml(pixel_m=METRES):
    "Tag 34683 as newer instruments of Thermo Fisher write it."
    return (
        '<Metadata xmlns:nil="http://schemas.fei.com/Metadata/v1/2013/07"><Instrument><InstrumentClass>Titan'
        "</InstrumentClass></Instrument><BinaryResult><PixelSize>"
        f'<X unit="m" unitPrefixPower="1">{pixel_m!r}</X><Y unit="m" unitPrefixPower="1">{pixel_m!r}</Y>'
        "</PixelSize></BinaryResult></Metadata>"
    )


def sightx_xml(magnification=500_000, mode="MAG", unit="X"):
    "The image description of JEOL's SightX, with what HyperSpy's reader wants as well."
    return (
        "<TemReporter><DateTime>2026-01-01T00:00:00.0000000+00:00</DateTime><Eos><EosMode>eosTEM</EosMode></Eos>"
        "<ElectronGun><AccelerationVoltage>200000</AccelerationVoltage></ElectronGun>"
        "<IlluminationSystem><ImageField>modeBF</ImageField></IlluminationSystem><ImageFormingSystem>"
        f"<ImageFormingMode>modeMAG</ImageFormingMode><ModeString>{mode}</ModeString><SelectorString>x</SelectorString>"
        f"<SelectorValue>{magnification}</SelectorValue><SelectorUnitString>{unit}</SelectorUnitString>"
        "</ImageFormingSystem></TemReporter>"
    )


def sis_tiff(data, pixel_m=METRES):
    "A TIFF of an Olympus SIS camera: tag 33560 points to a structure, which points to one with the pixel size."
    height, width = data.shape
    pixels = np.ascontiguousarray(data, "<f4").tobytes()
    n_tags = 10
    structure_at = 8 + 2 + 12 * n_tags + 4
    general_at = structure_at + 60 + 8
    pixels_at = general_at + 220
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 32),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, pixels_at),
        (277, 3, 1, 1),
        (279, 4, 1, len(pixels)),
        (339, 3, 1, 3),
        (33560, 4, 1, structure_at),
    ]
    ifd = struct.pack("<H", n_tags)
    ifd += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    structure = struct.pack("<4s6x5h6x32sH", b"SIS0", 30, 10, 1, 0, 126, b"image", 1)
    structure += struct.pack("<hhI", 1, 1, general_at)
    exponent, mantissa = -9, pixel_m / 1e-9
    general = struct.pack(
        "<10xhdd8xd2x34s32s", exponent, mantissa, mantissa, 5e4, b"Veleta", b"image"
    )
    return b"II*\0" + struct.pack("<I", 8) + ifd + structure + general.ljust(220, b"\0") + pixels


# --- Detectors


def cbf(
    data,
    notes="# Pixel_size 172e-6 m x 172e-6 m\r\n# Wavelength 0.0197 A\r\n# Detector_distance 0.5 m",
):
    "A CBF of whole numbers, each the difference to the one before."
    compressed = b""
    for step in np.diff(data.ravel().astype(np.int64), prepend=0).tolist():
        if -128 < step < 128:
            compressed += struct.pack("b", step)
        elif -(2**15) < step < 2**15:
            compressed += b"\x80" + struct.pack("<h", step)
        else:
            compressed += b"\x80\x00\x80" + struct.pack("<i", step)
    head = [
        '###CBF: VERSION 1.5, CBFlib v0.7.8 - PILATUS detectors\r\n_array_data.header_convention "PILATUS_1.2"',
        f"_array_data.header_contents\r\n;\r\n{notes}\r\n;",
        "_array_data.data\r\n;\r\n--CIF-BINARY-FORMAT-SECTION--",
        'Content-Type: application/octet-stream;\r\n     conversions="x-CBF_BYTE_OFFSET"',
        f"Content-Transfer-Encoding: BINARY\r\nX-Binary-Size: {len(compressed)}",
        'X-Binary-ID: 1\r\nX-Binary-Element-Type: "signed 32-bit integer"',
        "X-Binary-Element-Byte-Order: LITTLE_ENDIAN",
        f"Content-MD5: {b64encode(hashlib.md5(compressed).digest()).decode()}",
        f"X-Binary-Number-of-Elements: {data.size}",
        f"X-Binary-Size-Fastest-Dimension: {data.shape[1]}",
        f"X-Binary-Size-Second-Dimension: {data.shape[0]}\r\nX-Binary-Size-Padding: 1\r\n\r\n",
    ]
    tail = b"\r\n--CIF-BINARY-FORMAT-SECTION----\r\n;\r\n"
    return "\r\n".join(head).encode() + b"\x0c\x1a\x04\xd5" + compressed + tail


def smv(data, **more):
    "An SMV image with a header of 512 bytes."
    keys = {
        "DIM": 2,
        "BYTE_ORDER": "little_endian",
        "TYPE": "unsigned_short",
        "SIZE1": data.shape[1],
        "SIZE2": data.shape[0],
        "PIXEL_SIZE": 0.1,
        "WAVELENGTH": 0.0251,
        "DISTANCE": 500,
    } | more
    text = "{\nHEADER_BYTES=  512;\n" + "".join(f"{k}={v};\n" for k, v in keys.items()) + "}\n"
    return text.encode().ljust(512) + data.astype("<u2").tobytes()


def mib(frames):
    "Frames of a Merlin detector, bottom row first, each with a header of 384 bytes."
    raw = b""
    for i, data in enumerate(frames, 1):
        rows, columns = data.shape
        volts = ",".join(["0.000000E+0"] * 8)
        dacs = ",".join(["511"] * 27)
        head = (
            f"MQ1,{i:06d},00384,01,{columns:04d},{rows:04d},U16,   1x1,01,2026-01-01 10:00:00.000000,"
            f"0.001000,0,0,0,{volts},3RX,{dacs},MQ1A,2026-01-01T10:00:00.000000000Z,1000000ns,12,"
        )
        raw += head.encode().ljust(384, b"\0") + data[::-1].astype(">u2").tobytes()
    return raw


def dectris(folder, data, n=3, parts=1):
    "A series of a Dectris detector: NAME_master.h5 and its parts; the path of the first part."
    import h5py
    import hdf5plugin

    with h5py.File(folder / "series_master.h5", "w") as master:
        for i in range(1, parts + 1):
            name = f"series_data_{i:06d}.h5"
            master[f"entry/data/data_{i:06d}"] = h5py.ExternalLink(name, "/entry/data/data")
            with h5py.File(folder / name, "w") as part:
                frames = np.stack([data + n * (i - 1) + k for k in range(n)]).astype(np.uint16)
                part.create_dataset(
                    "entry/data/data",
                    data=frames,
                    chunks=(1, *data.shape),
                    **hdf5plugin.Bitshuffle(),
                )
        detector = master.create_group("entry/instrument/detector")
        detector["x_pixel_size"] = detector["y_pixel_size"] = 75e-6
        detector["detector_distance"] = 0.6
        master["entry/instrument/beam/incident_wavelength"] = 0.0197
    return folder / "series_data_000001.h5"


# --- EMD


def emd_array(file, place, data, dims, kind=1, first=1, array="data"):
    "A group of an EMD file: name, unit and coordinates of each axis."
    group = file.create_group(place)
    group.attrs["emd_group_type"] = kind
    group.create_dataset(array, data=data)
    for i, (name, unit, values) in enumerate(dims, first):
        vector = group.create_dataset(f"dim{i}", data=values)
        vector.attrs["name"], vector.attrs["units"] = name, unit


def prismatic(path, data, pixel_nm=PIXEL_NM, unit="[Å]", told_A=10 * PIXEL_NM):
    "A simulation of Prismatic: x before y, and the step of the probe beside it."
    import h5py

    height, width = data.shape
    steps = [
        ("R_x", unit, 10 * pixel_nm * np.arange(width)),
        ("R_y", unit, 10 * pixel_nm * np.arange(height)),
    ]
    with h5py.File(path, "w") as f:
        top = f.create_group("4DSTEM_simulation")
        top.attrs["version_major"], top.attrs["version_minor"] = 0, 5
        top.attrs["emd_group_type"] = 2
        place = "4DSTEM_simulation/data/realslices/annular_detector_depth0000"
        emd_array(f, place, data.T, steps, array="realslice")
        told = f.create_group(
            "4DSTEM_simulation/metadata/metadata_0/original/simulation_parameters"
        )
        told.attrs["rx"] = told.attrs["ry"] = told_A
    return path


def py4dstem(path, data, pixel_nm=PIXEL_NM, unit="nm", calibration_nm=PIXEL_NM):
    "A virtual image of py4DSTEM in EMD 1.0: two coordinates per axis, and the calibration of the whole tree."
    import h5py

    with h5py.File(path, "w") as f:
        f.attrs["emd_group_type"] = "file"
        f.attrs["version_major"], f.attrs["version_minor"] = 1, 0
        dims = [("Rx", unit, [0, pixel_nm]), ("Ry", unit, [0, pixel_nm])]
        emd_array(f, "root/haadf", data, dims, kind="array", first=0)
        place = f.create_group("root/metadatabundle/calibration")
        place["R_pixel_size"], place["R_pixel_units"] = calibration_nm, "nm"
    return path


# --- One file of each


def write(folder, kind, data):
    "A good file of one maker, with what belongs beside it; its path."
    import tifffile

    path = folder / f"{kind}.{ENDING[kind]}"
    columns = data.shape[1]
    tags = {
        "tescan": dict(extratags=[(50431, 1, len(tescan_tag()), tescan_tag(), True)]),
        "helios": dict(extratags=[(34682, 2, 0, helios_text(columns), True)]),
        "phenom": dict(extratags=[(34683, 2, 0, phenom_xml(), True)]),
        "titan": dict(extratags=[(34683, 2, 0, titan_xml(), True)]),
        "sightx": dict(
            extratags=[(271, 2, 0, "JEOL Ltd.", True)],
            description=sightx_xml(),
            resolution=(1000, 1000),  # 10 µm on the camera
            resolutionunit="CENTIMETER",
        ),
    }
    beside = {
        "tescan_hdr": ("tescan_hdr-tif.hdr", tescan_text()),
        "hitachi": ("hitachi.txt", hitachi_text(columns)),
        "jeol": ("jeol.txt", jeol_text(columns)),
        "npy": ("npy.json", json.dumps({"pixel_size_nm": PIXEL_NM})),
    }
    if kind in beside:
        name, text = beside[kind]
        (folder / name).write_bytes(text.encode())
    if kind == "npy":
        np.save(path, data)
    elif kind == "sis":
        path.write_bytes(sis_tiff(data))
    elif kind in ("cbf", "smv"):
        path.write_bytes(globals()[kind](data))
    elif kind == "mib":
        path.write_bytes(mib([data]))
    elif kind == "dectris":
        dectris(folder, data, n=1).rename(path)
    elif kind in ("prismatic", "py4dstem"):
        globals()[kind](path, data)
    else:
        tifffile.imwrite(path, data, metadata=None, **tags.get(kind, {}))
    return path
