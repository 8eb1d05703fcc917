//! The files that are measured. Nothing is written to that this program has not made, unless the person said so.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cleave_tests::cache::Cache;
use cleave_tests::interruption;
use cleave_tests::tools::Tools;
use rustix::fs::OFlags;

use crate::args::{self, Disk, Format};
use crate::{BenchError, Result};

/// A disk to measure.
#[derive(Debug, Clone)]
pub struct Image {
    pub path: PathBuf,
    pub format: Format,
    /// Whether its file system can do without the page cache.
    pub direct: bool,
}

/// The image of the command line, and the directory that goes with it when it was made.
pub struct Prepared {
    pub image: Image,
    _made: Option<tempfile::TempDir>,
}

/// Takes the file that `disk` names, or makes one. `writes`: it will be written to.
///
/// # Errors
/// There is none, it cannot be read, or it is not ours to write to.
pub fn prepare(disk: &Disk, writes: bool) -> Result<Prepared> {
    let Some(path) = &disk.file else {
        let directory = directory_in(&scratch_directory(disk)?)?;
        let raw = make_raw(directory.path(), disk.size.bytes())?;
        let image = if disk.format == Format::Raw { raw } else { make_qcow2(&raw)? };
        return Ok(Prepared { image, _made: Some(directory) });
    };
    check_kind(path)?;
    if writes && !disk.overwrite {
        return Err(BenchError::Usage(format!(
            "this writes to {0}: say --overwrite if nothing on it is needed, or let --scratch DIR make a file",
            path.display()
        )));
    }
    let image = Image { path: path.clone(), format: disk.format, direct: can_be_direct(path)? };
    Ok(Prepared { image, _made: None })
}

/// A fifo or a terminal would be waited for without end, for somebody to open its other side.
fn check_kind(path: &Path) -> Result<()> {
    let usage = |what: String| Err(BenchError::Usage(format!("--file {}: {what}", path.display())));
    match fs::metadata(path) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            usage(error.to_string())
        }
        Err(error) => Err(BenchError::Io { what: format!("--file {}", path.display()), source: error }),
        Ok(metadata) if metadata.is_dir() => usage("a directory; --scratch makes a file in it".into()),
        Ok(metadata) if metadata.is_file() || metadata.file_type().is_block_device() => Ok(()),
        Ok(_) => usage("neither a regular file nor a block device".into()),
    }
}

/// Where files are made: where the person said, or on the file system that holds the build.
pub fn scratch_directory(disk: &Disk) -> Result<PathBuf> {
    if let Some(given) = &disk.scratch {
        return Ok(given.clone());
    }
    let ours = cleave_tests::cache::target_directory().join("tmp");
    fs::create_dir_all(&ours).map_err(BenchError::io(format!("create {}", ours.display())))?;
    Ok(ours)
}

/// A directory that is removed with what is in it when it is dropped, or when this program is interrupted.
pub fn directory_in(parent: &Path) -> Result<tempfile::TempDir> {
    if !parent.is_dir() {
        let place = parent.display();
        return Err(BenchError::Usage(format!(
            "{place} is no directory: name one that is there, to make files in"
        )));
    }
    let what = format!("make a directory in {}", parent.display());
    let made = tempfile::Builder::new().prefix("block-bench.").tempdir_in(parent);
    let made = made.map_err(BenchError::io(what))?;
    interruption::removes(made.path());
    Ok(made)
}

/// Written out, not sparse: reading a hole is no reading.
pub fn make_raw(directory: &Path, bytes: u64) -> Result<Image> {
    let path = directory.join("disk.raw");
    let mut dd = Command::new("dd");
    dd.arg("if=/dev/urandom").arg(format!("of={}", path.display()));
    dd.args(["bs=1M", "conv=fsync", "status=none"]).arg(format!("count={}", bytes.div_ceil(1 << 20)));
    program(&mut dd)?;
    let file = OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(bytes));
    file.map_err(BenchError::io(format!("make {}", path.display())))?;
    let direct = can_be_direct(&path)?;
    Ok(Image { path, format: Format::Raw, direct })
}

/// The same content as qcow2, beside it.
pub fn make_qcow2(raw: &Image) -> Result<Image> {
    let path = raw.path.with_extension("qcow2");
    let mut convert = tools()?.command("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw.path).arg(&path);
    program(&mut convert)?;
    Ok(Image { path, format: Format::Qcow2, direct: raw.direct })
}

fn can_be_direct(path: &Path) -> Result<bool> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let opened = OpenOptions::new().read(true).custom_flags(direct).open(path);
    match opened {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(BenchError::Io { what: format!("open {}", path.display()), source: error }),
    }
}

/// The peers come from Debian's packages, whatever this machine has of its own.
pub fn tools() -> Result<Tools> {
    Ok(Tools::open(&Cache::open()?)?)
}

/// Runs a program to its end and gives what it printed.
pub fn program(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let name = Path::new(&name).file_name().map_or(name.clone(), |name| name.to_string_lossy().into_owned());
    let output = command.output().map_err(|source| BenchError::Start { name: name.clone(), source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(BenchError::Program { name, status: output.status, said });
    }
    Ok(output.stdout)
}

/// What fio and the daemons are told of an image.
pub fn describe(image: &Image) -> String {
    let page_cache = if image.direct { "O_DIRECT" } else { "through the page cache (no O_DIRECT there)" };
    format!("{} ({}, {page_cache})", image.path.display(), args::word(image.format))
}
