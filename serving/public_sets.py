"""Readers of public haemorrhage sets, and of a site's own series, each in the layout that it is handed out in.

None is shipped. Unpack one below the data folder under its name in `PUBLIC_SETS`, and it reads as `serving.readers`
does: one `LabelledVolume` at a time. Whoever combines sets must split them by patient together: BHSD was drawn from
RSNA 2019 (its PatientIDs are the same here), and `ct-ich-nifti` shows the patients of `ct-ich`.

- rsna-2019: RSNA 2019 haemorrhage detection; Flanders et al. 2020, Kaggle; RSNA's terms, non-commercial.
- cq500: Chilamkurthy et al. 2018, qure.ai (Academic Torrents, Kaggle); CC BY-NC-SA 4.0.
- bhsd: Wu et al. 2023, github.com/White65534/BHSD (`label_192`); stated as MIT and as non-commercial: ask the authors.
- instance-2022: Li et al. 2023, instance.grand-challenge.org (`train_2`); CC BY-NC-ND, by its agreement.
- ct-ich-nifti: Hssayeni et al. 2020, PhysioNet CT-ICH 1.3.1; PhysioNet Restricted Health Data License 1.5.0.
- site: a site's own series of DICOM, listed in `series.csv`; the site's own terms.

Hounsfield units, axes and notes are those of `herald.volume`. Every error is a ConfigError with file, reason and cure.
"""

import csv
import hashlib
import re
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.config import disable_value_validation
from pydicom.errors import InvalidDicomError
from rich.console import Console
from rich.progress import track

from herald.errors import ConfigError, DicomError, PixelDataError
from herald.signatures import FINDINGS
from herald.volume import AIR_HOUNSFIELD, Hounsfield, Volume, read_datasets, volume_from_datasets
from serving.readers import UNKNOWN, LabelledVolume, anywhere, voxel_truth

Truth = NDArray[np.uint8]

RSNA_SUBTYPES = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
RSNA_INDEX = "herald-index.sqlite"

CQ500_FINDINGS = {"any": ("ICH",), "iph": ("IPH",), "ivh": ("IVH",), "sah": ("SAH",), "edh_sdh": ("EDH", "SDH")}
CQ500_READERS = ("R1", "R2", "R3")
CQ500_CONTRAST = re.compile(r"(?<!pre )contrast|\bpost\b|cect|\d+cc\b|oral iv", re.I)
CQ500_SHARP = re.compile(r"bone|pns|hrct|hi ?res|detail|orbit", re.I)
CQ500_FEWEST_IMAGES = 8
"""Of a series that covers a head; scouts have fewer."""
NODE_THICKNESS_MM = 5.0
"""To which the node averages thin slices; of several series, the one nearest to it is read."""

BHSD_LABELS = {1: "edh_sdh", 2: "iph", 3: "ivh", 4: "sah", 5: "edh_sdh"}
"""Epidural 1, subdural 5, as in the set's dataset.json."""
BHSD_FOLDERS = (("images", "ground truths"), ("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))

CT_ICH_NIFTI_KINDS = {"iph": ("Intraparenchymal",), "ivh": ("Intraventricular",), "sah": ("Subarachnoid",),
                      "edh_sdh": ("Epidural", "Subdural")}  # fmt: skip
ADULT_YEARS = 18

LEAST_AIR_HOUNSFIELD = -200
"""A volume whose lowest value is higher holds no air, so it is not in Hounsfield units."""


# --- RSNA 2019: one folder of DICOM files, one CSV of six rows a slice -----------------------------------------------


def rsna_series(folder: Path) -> list[str]:
    """SeriesInstanceUIDs below `folder`, which holds stage_2_train/ID_*.dcm and stage_2_train.csv, sorted.

    The files of a series lie scattered among 752,803, so an index of all headers is written beside them first: about a
    quarter of an hour, once. Raises ConfigError where something is missing, damaged, or the folder cannot be written.
    """
    with closing(_rsna_index(folder)) as index:
        return [uid for (uid,) in index.execute("SELECT DISTINCT series FROM image ORDER BY series")]


def read_rsna(folder: Path, series: str) -> LabelledVolume:
    """One series; experts said of each slice whether and what bleeds, and no voxel of a bleeding slice is known.

    A slice without a row in the CSV is UNKNOWN. `patient` is the PatientID of the set, which is a pseudonym.
    """
    with closing(_rsna_index(folder)) as index:
        rows = index.execute(
            "SELECT image.name, patient, known, positive FROM image LEFT JOIN label USING (name) WHERE series = ?",
            (series,),
        ).fetchall()
    if not rows:
        raise ConfigError(f"{folder} has no series {series}; rsna_series lists what there is")
    images = _rsna_images(folder)
    paths = [images / f"{name}.dcm" for name, *_ in rows]
    volume, uids = _dicom_volume(paths, amend=_unwrapped)
    truths = {
        uid: _rsna_truth(known or 0, positive or 0) for uid, (*_, known, positive) in zip(uids, rows, strict=True)
    }
    slice_truth = np.array([truths[uid] for uid in volume.sop_instance_uids], dtype=np.uint8)
    return LabelledVolume("rsna-2019", rows[0][1], volume, _from_slices(volume, slice_truth), slice_truth)


def _rsna_truth(known: int, positive: int) -> list[int]:
    """Truth of each finding from two sets of bits in the order of RSNA_SUBTYPES."""
    subtypes = {name: (positive >> i & 1 if known >> i & 1 else UNKNOWN) for i, name in enumerate(RSNA_SUBTYPES)}
    extra_axial = (subtypes["epidural"], subtypes["subdural"])
    outside = 1 if 1 in extra_axial else max(extra_axial)  # UNKNOWN outweighs 0
    inside = [subtypes[name] for name in ("any", "intraparenchymal", "intraventricular", "subarachnoid")]
    return [*inside, outside]


def _unwrapped(ds: Dataset) -> None:
    """Mend slices of one of the set's scanners, where values below -1000 + 4096 wrapped round: air reads as 3096.

    Unsigned 12 bits with an intercept near 0 cannot hold air at all, so such a header is wrong for certain.
    """
    if (ds.get("BitsStored"), ds.get("PixelRepresentation")) != (12, 0) or float(
        ds.get("RescaleIntercept", -1024)
    ) < -100:
        return
    try:
        pixels = ds.pixel_array
    except Exception:  # damaged pixels: `volume_from_datasets` says so, and leaves the slice out
        return
    ds.PixelData = ((pixels.astype(np.int32) + 1000) % 4096).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.RescaleIntercept = -1000


def _rsna_images(folder: Path) -> Path:
    return _first_folder(folder, ("stage_2_train", "stage_2_train_images"), "unpack the training images there")


def _rsna_index(folder: Path) -> sqlite3.Connection:
    """The index of `folder`, made anew where it is missing or older than what it describes; the caller closes it."""
    images, labels = _rsna_images(folder), _file(folder, ("stage_2_train.csv",))
    state = f"{images.stat().st_mtime_ns} {labels.stat().st_mtime_ns} {labels.stat().st_size}"
    path = folder / RSNA_INDEX
    if path.is_file():
        index = sqlite3.connect(path)
        try:
            if index.execute("SELECT state FROM described").fetchone() == (state,):
                return index
        except sqlite3.DatabaseError:
            pass  # cut short or damaged: made anew
        index.close()
    partly = folder / f"{RSNA_INDEX}.partly"
    try:
        partly.unlink(missing_ok=True)
        with closing(sqlite3.connect(partly)) as index, index:
            index.executescript(
                "CREATE TABLE label (name TEXT PRIMARY KEY, known INTEGER, positive INTEGER) WITHOUT ROWID;"
                "CREATE TABLE image (name TEXT PRIMARY KEY, series TEXT, patient TEXT) WITHOUT ROWID;"
                "CREATE INDEX by_series ON image (series);"
                "CREATE TABLE described (state TEXT);"
            )
            index.executemany(
                "INSERT INTO label VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE"
                " SET known = known | excluded.known, positive = positive | excluded.positive",
                _rsna_labels(labels),
            )
            index.executemany("INSERT INTO image VALUES (?, ?, ?)", _rsna_headers(images))
            index.execute("INSERT INTO described VALUES (?)", (state,))
        partly.replace(path)
    except (sqlite3.OperationalError, OSError) as error:
        raise ConfigError(f"{path} cannot be written ({error}); link its files into a folder that can be") from error
    return sqlite3.connect(path)


def _rsna_labels(path: Path) -> Iterator[tuple[str, int, int]]:
    for line, row in table_rows(path, ("ID", "Label")):
        name, _, subtype = row["ID"].rpartition("_")
        if subtype not in RSNA_SUBTYPES:
            raise ConfigError(
                f"{path}, line {line}: ID {row['ID']!r} does not end in one of {', '.join(RSNA_SUBTYPES)}; download the"
                " file again"
            )
        bit = 1 << RSNA_SUBTYPES.index(subtype)
        yield name, bit, bit * _flag(path, line, row, "Label")


def _rsna_headers(images: Path) -> Iterator[tuple[str, str, str]]:
    paths = sorted(images.glob("*.dcm"))
    if not paths:
        raise ConfigError(f"{images} holds no .dcm file; unpack the training images there")
    for path in track(paths, description="indexing rsna-2019", console=Console(stderr=True), transient=True):
        header = _header(path)
        yield path.stem, str(header.get("SeriesInstanceUID", "")), str(header.get("PatientID", ""))


# --- CQ500: a folder of DICOM series a case, three readers' word on each case ----------------------------------------


def cq500_cases(folder: Path) -> list[str]:
    """Cases, as CQ500CT12, that have a row in reads.csv and a plain series on disk, in order of their number.

    `folder` holds reads.csv and `CQ500CT12 CQ500CT12/Unknown Study/CT .../*.dcm`, the latter perhaps one folder deeper.
    """
    reads, cases = _cq500_reads(folder), _cq500_folders(folder)
    plain = [case for case in sorted(reads.keys() & cases.keys()) if _cq500_plain(cases[case])]
    if not plain:
        raise ConfigError(
            f"{folder} holds no plain series of a case in reads.csv; unpack the folders 'CQ500CTn CQ500CTn' there"
        )
    return [f"CQ500CT{case}" for case in plain]


def read_cq500(folder: Path, case: str) -> LabelledVolume:
    """The plain axial series of one case that is nearest to 5 mm, soft kernel first.

    What two of three readers saw is the truth of the study (`study_truth`); where in the scan, nobody said: slices
    and voxels are 0 for what the study does not show and UNKNOWN for what it does.
    """
    number = int(case.removeprefix("CQ500CT")) if re.fullmatch(r"CQ500CT\d+", case) else -1
    reads, cases = _cq500_reads(folder), _cq500_folders(folder)
    if number not in reads or number not in cases:
        raise ConfigError(f"{folder} has no case {case} on disk and in reads.csv; cq500_cases lists what there is")
    volume, _ = _dicom_volume(_cq500_series(cases[number]))
    line, row = reads[number]
    path = _file(folder, ("reads.csv",))
    votes = [
        sum(any(_flag(path, line, row, f"{reader}:{kind}") for kind in kinds) for reader in CQ500_READERS)
        for kinds in (CQ500_FINDINGS[finding] for finding in FINDINGS)
    ]
    study_truth = (np.array(votes) >= 2).astype(np.uint8)
    study_truth[0] = study_truth.any()
    return _of_study("cq500", case, volume, study_truth)


def _cq500_reads(folder: Path) -> dict[int, tuple[int, dict[str, str]]]:
    path = _file(folder, ("reads.csv",))
    columns = [f"{r}:{kind}" for r in CQ500_READERS for kinds in CQ500_FINDINGS.values() for kind in kinds]
    reads = {}
    for line, row in table_rows(path, ("name", *columns)):
        name = re.fullmatch(r"CQ500-CT-(\d+)", row["name"].strip())
        if name is None:
            raise ConfigError(f"{path}, line {line}: name {row['name']!r} is not CQ500-CT-n; download the file again")
        reads[int(name[1])] = (line, row)
    return reads


def _cq500_folders(folder: Path) -> dict[int, Path]:
    paths = [path for pattern in ("CQ500CT*", "*/CQ500CT*") for path in folder.glob(pattern)]
    return {int(name[1]): path for path in sorted(paths) if (name := re.match(r"CQ500CT(\d+)", path.name))}


def _cq500_plain(case: Path) -> list[Path]:
    """Folders of series whose name does not tell of contrast medium."""
    return sorted(p for p in case.glob("*/*") if p.is_dir() and not CQ500_CONTRAST.search(p.name))


def _cq500_series(case: Path) -> list[Path]:
    found = []
    for folder in _cq500_plain(case):
        paths = sorted(folder.glob("*.dcm"))
        if len(paths) < CQ500_FEWEST_IMAGES:
            continue
        header = _header(paths[0])
        cosines = np.array(header.get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0), dtype=np.float64)
        thickness = float(header.get("SliceThickness") or NODE_THICKNESS_MM)
        if abs(np.cross(cosines[:3], cosines[3:])[2]) > 0.8:
            sharp = bool(CQ500_SHARP.search(folder.name))
            found.append((sharp, abs(thickness - NODE_THICKNESS_MM), folder.name, paths))
    if not found:
        raise ConfigError(
            f"{case} has no axial series of at least {CQ500_FEWEST_IMAGES} images without contrast medium; unpack it"
            " again, or take its row out of reads.csv"
        )
    return min(found)[3]


# --- BHSD and INSTANCE 2022: a NIfTI volume and a NIfTI mask a case --------------------------------------------------


def bhsd_cases(folder: Path) -> list[str]:
    """Cases of BHSD with masks, as ID_<PatientID>_ID_<StudyInstanceUID>, sorted."""
    return sorted(_bhsd_pairs(folder))


def read_bhsd(folder: Path, case: str) -> LabelledVolume:
    """One volume with experts' mask of each kind: every voxel is known.

    Four masks of the set have another affine than their image. A mask that this turns otherwise may lie anywhere, so
    that only `study_truth` is taken from it.
    """
    image, mask_path = _pair(_bhsd_pairs(folder), case, folder)
    scan = _nifti_scan(image)
    labels = _labels(mask_path, scan, tuple(BHSD_LABELS))
    truth = np.zeros((*labels.values.shape, len(FINDINGS)), dtype=np.uint8)
    truth[..., 0] = labels.values > 0
    for label, finding in BHSD_LABELS.items():
        truth[..., FINDINGS.index(finding)] |= labels.values == label
    patient = "_".join(case.split("_")[:2])
    slice_truth = np.asarray(truth.any(axis=(1, 2)), dtype=np.uint8)
    if not labels.in_place:
        return _of_study("bhsd", patient, scan.volume, anywhere(slice_truth))
    return LabelledVolume("bhsd", patient, scan.volume, truth, slice_truth)


def _bhsd_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    root = folder / "label_192" if (folder / "label_192").is_dir() else folder
    pairs: dict[str, tuple[Path, Path]] = {}
    for images, masks in BHSD_FOLDERS:
        if (root / images).is_dir():
            pairs |= _pairs(root / images, root / masks)
    if not pairs:
        raise ConfigError(f"{root} holds no volume in images, imagesTr or imagesTs; unpack label_192.zip in {folder}")
    return pairs


def instance_cases(folder: Path) -> list[str]:
    """Cases of INSTANCE 2022 in train_2/data with their mask in train_2/label, as 001, sorted."""
    return sorted(_instance_pairs(folder))


def read_instance(folder: Path, case: str) -> LabelledVolume:
    """One volume with experts' mask of all blood; of which kind it is, the set does not say."""
    image, mask_path = _pair(_instance_pairs(folder), case, folder)
    scan = _nifti_scan(image)
    labels = _labels(mask_path, scan, (1,))
    mask = labels.values > 0
    slice_truth = np.zeros((len(mask), len(FINDINGS)), dtype=np.uint8)
    slice_truth[mask.any(axis=(1, 2))] = [1, *[UNKNOWN] * (len(FINDINGS) - 1)]
    if not labels.in_place:
        return _of_study("instance-2022", case, scan.volume, anywhere(slice_truth))
    return LabelledVolume("instance-2022", case, scan.volume, voxel_truth(mask, slice_truth), slice_truth)


def _instance_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    root = _first_folder(folder, ("train_2", "train"), "unpack train_2.zip there")
    pairs = _pairs(root / "data", root / "label")
    if not pairs:
        raise ConfigError(f"{root / 'data'} holds no .nii.gz file; unpack train_2.zip in {folder}")
    return pairs


# --- CT-ICH 1.3.1: NIfTI volumes and masks, one CSV of kinds a slice -------------------------------------------------


def ct_ich_nifti_patients(folder: Path) -> list[str]:
    """Patients, as 049, that have a volume in ct_scans, sorted."""
    return sorted(_ct_ich_pairs(folder))


def read_ct_ich_nifti(folder: Path, patient: str) -> LabelledVolume:
    """As `serving.readers.read_ct_ich`, in original Hounsfield units and geometry.

    SliceNumber counts the planes of the file from 1. Planes without a row are UNKNOWN unless they are outlined.
    """
    image, mask_path = _pair(_ct_ich_pairs(folder), patient, folder)
    path = _file(folder, ("hemorrhage_diagnosis_raw_ct.csv", "hemorrhage_diagnosis.csv"))
    scan = _nifti_scan(image)
    labels = _labels(mask_path, scan, ())
    mask = labels.values > 0
    stored = np.full((len(mask), len(FINDINGS)), UNKNOWN, dtype=np.uint8)
    columns = [column for kinds in CT_ICH_NIFTI_KINDS.values() for column in kinds]
    for line, row in table_rows(path, ("PatientNumber", "SliceNumber", *columns)):
        if row["PatientNumber"].strip().zfill(3) != patient:
            continue
        number = row["SliceNumber"].strip()
        if not number.isdecimal() or not 1 <= int(number) <= len(stored):
            raise ConfigError(
                f"{path}, line {line}: SliceNumber {number!r} is none of the {len(stored)} planes of {image.name};"
                " download both again"
            )
        kinds = [any(_flag(path, line, row, c) for c in CT_ICH_NIFTI_KINDS[kind]) for kind in FINDINGS[1:]]
        stored[int(number) - 1] = [any(kinds), *kinds]
    slice_truth = stored[scan.stored_planes]
    outlined = mask.any(axis=(1, 2)) & labels.in_place
    no_kind = outlined & ~(slice_truth[:, 1:] == 1).any(axis=1)
    slice_truth[outlined, 0] = 1
    slice_truth[no_kind, 1:] = UNKNOWN
    truth = voxel_truth(mask if labels.in_place else np.zeros_like(mask), slice_truth)
    return LabelledVolume(
        "ct-ich-nifti", patient, scan.volume, truth, slice_truth, child=_ct_ich_child(folder, patient)
    )


def _ct_ich_pairs(folder: Path) -> dict[str, tuple[Path, Path]]:
    pairs = _pairs(folder / "ct_scans", folder / "masks")
    if not pairs:
        raise ConfigError(f"{folder / 'ct_scans'} holds no .nii file; download CT-ICH 1.3.1 from PhysioNet to {folder}")
    return pairs


def _ct_ich_child(folder: Path, patient: str) -> bool | None:
    """Whether the patient is under 18; its table has two rows of headings and starts with patient and age."""
    path = folder / "Patient_demographics.csv"
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        for row in csv.reader(file):
            if len(row) > 1 and row[0].strip().zfill(3) == patient:
                try:
                    return float(row[1]) < ADULT_YEARS
                except ValueError:
                    return None
    return None


# --- a site's own series ---------------------------------------------------------------------------------------------


def site_series(folder: Path) -> list[str]:
    """Names, made from the paths, of the series that `folder`/series.csv lists, in its order.

    Columns: `path`, a folder of one DICOM series, absolute or from the CSV's own folder; `label`, 1 for haemorrhage, 0
    for none; as far as known `iph`, `ivh`, `sah`, `edh_sdh` (0, 1 or empty), `child` (0, 1 or empty) and `patient`.
    """
    return list(_site_rows(folder))


def read_site(folder: Path, series: str) -> LabelledVolume:
    """One series of a site, labelled as a whole: `study_truth`, and slices and voxels as in `read_cq500`.

    Without the column `patient`, series are told to be of one patient by a digest of PatientID, never by itself.
    """
    rows = _site_rows(folder)
    if series not in rows:
        raise ConfigError(f"{folder / 'series.csv'} has no series {series}; it has {', '.join(list(rows)[:5])}, …")
    line, row = rows[series]
    table = folder / "series.csv"
    study_truth = np.full(len(FINDINGS), UNKNOWN, dtype=np.uint8)
    study_truth[0] = _flag(table, line, row, "label")
    for c, kind in enumerate(FINDINGS[1:], start=1):
        if (row.get(kind) or "").strip():
            study_truth[c] = _flag(table, line, row, kind)
    if study_truth[0] == 0:
        if (study_truth[1:] == 1).any():
            raise ConfigError(f"{table}, line {line}: label is 0, yet a kind of haemorrhage is 1; correct one of them")
        study_truth[:] = 0
    child = bool(_flag(table, line, row, "child")) if (row.get("child") or "").strip() else None
    volume, patient = site_volume(table, line, row)
    return _of_study("site", patient, volume, study_truth, child)


def site_volume(table: Path, line: int, row: Mapping[str, str]) -> tuple[Volume, str]:
    """The one DICOM series in the folder that the cell `path` of a row names, and its patient.

    Paths are absolute or from the folder of `table`. The patient is the cell `patient`, else a digest of PatientID.
    Raises ConfigError.
    """
    source = table.parent / row["path"]
    if not source.is_dir():
        raise ConfigError(f"{table}, line {line}: {source} is not a folder; correct the path")
    paths = sorted(p for p in source.rglob("*") if p.is_file() and p.name != "DICOMDIR" and not p.name.startswith("."))
    headers = [_header(path) for path in paths]
    found = Counter(str(header.get("SeriesInstanceUID", "")) for header in headers)
    if len(found) != 1:
        raise ConfigError(
            f"{table}, line {line}: {source} holds {len(found)} DICOM series; name a folder that holds one"
        )
    identity = str(headers[0].get("PatientID", "")) or str(paths[0])
    patient = (row.get("patient") or "").strip() or hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    volume, _ = _dicom_volume(paths)
    return volume, patient


def _site_rows(folder: Path) -> dict[str, tuple[int, dict[str, str]]]:
    path = _file(folder, ("series.csv",))
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    for line, row in table_rows(path, ("path", "label")):
        name = re.sub(r"[^\w.-]+", "-", row["path"]).strip("-")
        if name in rows:
            raise ConfigError(f"{path}, line {line}: {row['path']} is listed before; take one row out")
        rows[name] = (line, row)
    if not rows:
        raise ConfigError(f"{path} lists no series; write a row of path and label for each")
    return rows


# --- all sets --------------------------------------------------------------------------------------------------------

List = Callable[[Path], list[str]]
Read = Callable[[Path, str], LabelledVolume]

PUBLIC_SETS: dict[str, tuple[str, List, Read]] = {
    "rsna-2019": ("rsna-2019", rsna_series, read_rsna),
    "cq500": ("cq500", cq500_cases, read_cq500),
    "bhsd": ("bhsd", bhsd_cases, read_bhsd),
    "instance-2022": ("instance-2022", instance_cases, read_instance),
    "ct-ich-nifti": ("ct-ich-nifti", ct_ich_nifti_patients, read_ct_ich_nifti),
    "site": ("site", site_series, read_site),
}
"""As `serving.readers.SETS`: folder below the data folder, how to list what it holds, how to read one; by name.

What is listed is a series or a study, and a patient may have several: split by `LabelledVolume.patient`.
"""


def read_public_set(data: Path, source: str) -> Iterator[LabelledVolume]:
    """All of one set below the data folder, in order, one at a time."""
    folder, names, read = PUBLIC_SETS[source]
    for name in names(data / folder):
        yield read(data / folder, name)


# --- labels ----------------------------------------------------------------------------------------------------------


def _of_study(
    source: str, patient: str, volume: Volume, study_truth: Truth, child: bool | None = None
) -> LabelledVolume:
    """What is only known of the whole scan (C,): its slices are 0 where it is 0, and UNKNOWN elsewhere."""
    of_slice = np.where(study_truth == 0, 0, UNKNOWN).astype(np.uint8)
    slice_truth = np.tile(of_slice, (volume.slice_count, 1))
    truth = _from_slices(volume, slice_truth)
    return LabelledVolume(source, patient, volume, truth, slice_truth, child, study_truth)


def _from_slices(volume: Volume, slice_truth: Truth) -> Truth:
    """Voxels (D, H, W, C) are 0 where their slice is, and UNKNOWN elsewhere: a read-only view that takes no memory."""
    of_voxel = np.where(slice_truth == 0, 0, UNKNOWN).astype(np.uint8)
    return np.broadcast_to(of_voxel[:, None, None, :], (*volume.hounsfield.shape, len(FINDINGS)))


# --- files -----------------------------------------------------------------------------------------------------------


def _first_folder(folder: Path, names: Sequence[str], cure: str) -> Path:
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise ConfigError(f"{folder / names[0]} is missing; {cure}, or point --data at the folder that holds the data sets")


def _file(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{folder / names[0]} is missing; it belongs to the set: put it there")


def table_rows(path: Path, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of a CSV that must have `columns`, one at a time."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            missing = [column for column in columns if column not in (table.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path} has no column {', '.join(missing)}; use the file of the set as it came")
            for row in table:
                if None in row.values() or None in row:
                    raise ConfigError(
                        f"{path}, line {table.line_num}: not as many cells as columns; get the file again"
                    )
                yield table.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file ({error}); get it again") from error


def _flag(path: Path, line: int, row: dict[str, str], column: str) -> int:
    value = row[column].strip()
    if value not in ("0", "1"):
        raise ConfigError(f"{path}, line {line}: {column} is {value!r}, not 0 or 1; correct the file")
    return int(value)


def _header(path: Path) -> Dataset:
    """What tells series apart; raises ConfigError naming a file that is not DICOM."""
    tags = ["PatientID", "SeriesInstanceUID", "ImageOrientationPatient", "SliceThickness"]
    try:
        with disable_value_validation():  # the UIDs of RSNA 2019 are none
            header = dcmread(path, stop_before_pixels=True, specific_tags=tags)
            for _ in header:
                pass  # each element is decoded here, while validation is off
            return header
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError) as error:
        raise _not_dicom(path, error) from error


def _not_dicom(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} cannot be read as DICOM ({error}); get it again, or take it away")


def _dicom_volume(paths: Sequence[Path], amend: Callable[[Dataset], None] | None = None) -> tuple[Volume, list[str]]:
    """One series as the node makes a volume of it, and the SOPInstanceUID of each path; `amend` mends data sets first.

    Slices whose pixels are damaged are left out, and `Volume.unreadable` lists them.
    """
    datasets = []
    with disable_value_validation():
        for path in paths:
            try:
                (ds,) = read_datasets([path])
            except DicomError as error:
                raise _not_dicom(path, error) from error
            if amend is not None:
                amend(ds)
            datasets.append(ds)
        try:
            volume = volume_from_datasets(datasets)
        except DicomError as error:
            what = "no image can be decoded" if isinstance(error, PixelDataError) else "the images make no volume"
            raise ConfigError(f"{paths[0].parent}: {what} ({error}); get them again, or take them away") from error
        return volume, [str(ds.get("SOPInstanceUID", "")) for ds in datasets]


def _pairs(images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    """Volumes in `images` by name, and where the mask of each belongs."""
    paths = sorted(p for p in images.glob("*.nii*") if p.name.endswith((".nii", ".nii.gz")))
    return {p.name.split(".nii")[0]: (p, masks / p.name) for p in paths}


def _pair(pairs: dict[str, tuple[Path, Path]], name: str, folder: Path) -> tuple[Path, Path]:
    if name not in pairs:
        raise ConfigError(f"{folder} has no case {name}; it has {', '.join(sorted(pairs)[:5])}, …")
    image, mask = pairs[name]
    if not mask.is_file():
        raise ConfigError(f"{mask} is missing, the mask of {image.name}; get it, or take the volume away")
    return image, mask


# --- NIfTI -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Scan:
    """A NIfTI file as a `Volume`, and how its axes were turned for that.

    `turns` (3, 2) is nibabel's orientation of the stored axes, `shape` the stored one, and `stored_planes` (D,) says
    which stored plane each slice is.
    """

    volume: Volume
    turns: NDArray[np.float64]
    shape: tuple[int, ...]
    stored_planes: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class _Labels:
    """Whole numbers (D, H, W) of a mask; `in_place` is False where image and mask contradict each other on axes."""

    values: NDArray[np.uint8]
    in_place: bool


def _nifti(path: Path) -> tuple[Any, NDArray[Any]]:
    """Image and its values (X, Y, Z), scaled; raises ConfigError."""
    import nibabel  # heavy, and only these sets need it
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image = nibabel.load(path)
        values = np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read as NIfTI ({error}); get it again, or take it away") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise ConfigError(f"{path} has the shape {values.shape}, not that of one volume; get it again, or take it away")
    return image, values


def _turned(values: NDArray[Any], turns: NDArray[np.float64]) -> NDArray[Any]:
    """Stored (X, Y, Z) to the axes of `herald.volume`: up, to the back, to the patient's left."""
    from nibabel.orientations import apply_orientation

    to_right_front_up: NDArray[Any] = apply_orientation(values, turns)  # type: ignore[no-untyped-call]
    return to_right_front_up.transpose(2, 1, 0)[:, ::-1, ::-1]


def _nifti_scan(path: Path) -> _Scan:
    """A CT volume by its affine; raises ConfigError where it cannot be read or is not in Hounsfield units."""
    from nibabel.orientations import inv_ornt_aff, io_orientation

    image, values = _nifti(path)
    lowest = float(np.nanmin(values))
    if lowest > LEAST_AIR_HOUNSFIELD:
        raise ConfigError(
            f"{path} holds no value below {lowest:g}, so it is not in Hounsfield units; use the volumes as they came"
        )
    turns = io_orientation(image.affine)  # type: ignore[no-untyped-call]
    # now x to the right, y to the front, z up
    affine = image.affine @ inv_ornt_aff(turns, values.shape)  # type: ignore[no-untyped-call]
    finite = np.nan_to_num(values, nan=AIR_HOUNSFIELD, posinf=32767, neginf=AIR_HOUNSFIELD)
    hounsfield: Hounsfield = np.clip(np.rint(finite), AIR_HOUNSFIELD, 32767).astype(np.int16)
    right, front, up = affine[:3, :3].T
    normal = np.cross(right, front)
    normal /= np.linalg.norm(normal)
    step = up if abs(normal[1]) < 1e-3 else normal  # as `herald.volume` has it: a sheared stack, or tilted slices
    tilt = float(np.degrees(np.arctan2(-step[1], step[2])))  # DICOM's y points to the back (PS3.3 C.7.6.2)
    notes = []
    if not int(image.header["qform_code"]) and not int(image.header["sform_code"]):
        notes.append("the NIfTI file does not say how the head lies; taken as its axes are stored")
    if abs(tilt) >= 0.5:
        notes.append(f"gantry tilt {tilt:+.1f} degrees")
    axis = int(np.flatnonzero(turns[:, 0] == 2)[0])
    stored_planes = np.arange(values.shape[axis])[:: int(turns[axis, 1])]
    volume = Volume(
        hounsfield=np.ascontiguousarray(_turned(hounsfield, turns)),
        positions_mm=np.array([float(normal @ (affine[:3, 3] + i * up)) for i in range(len(stored_planes))]),
        pixel_spacing_mm=(float(np.linalg.norm(front)), float(np.linalg.norm(right))),
        orientation="axial" if abs(normal[2]) >= 0.8 else "oblique",
        gantry_tilt_deg=tilt,
        notes=tuple(notes),
    )
    return _Scan(volume, turns, values.shape, stored_planes)


def read_cranium(path: Path) -> Volume:
    """The thin-slice head without contrast or bleeding of Debian's invesalius-examples; raises ConfigError."""
    volume = _nifti_scan(path).volume
    return replace(volume, hounsfield=np.ascontiguousarray(volume.hounsfield[:, ::-1]))  # its affine turns the face


def _labels(path: Path, scan: _Scan, allowed: Sequence[int]) -> _Labels:
    """The mask of `scan`: it lies on the same grid, so the volume's affine turns both; raises ConfigError.

    Where `allowed` is empty, what lies above half the highest value is 1.
    """
    from nibabel.orientations import io_orientation

    image, values = _nifti(path)
    if values.shape != scan.shape:
        raise ConfigError(f"{path} has the shape {values.shape}, its volume {scan.shape}; get both again")
    whole = np.rint(values) if allowed else values > values.max() / 2
    strange = set(np.unique(whole).tolist()) - {0, 1, *allowed}
    if strange or (allowed and not np.allclose(values, whole, atol=0.01)):
        raise ConfigError(f"{path} holds other values than 0 and {', '.join(map(str, allowed))}; get it again")
    in_place = True
    if int(image.header["qform_code"]) or int(image.header["sform_code"]):
        own = io_orientation(image.affine)  # type: ignore[no-untyped-call]
        in_place = bool(np.array_equal(own, scan.turns))
    return _Labels(np.ascontiguousarray(_turned(whole.astype(np.uint8), scan.turns)), in_place)
