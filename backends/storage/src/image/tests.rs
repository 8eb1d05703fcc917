use std::io::Write;

use super::*;

fn file(len: usize) -> tempfile::NamedTempFile {
    // Beside the build: a tmpfs would have no O_DIRECT on older kernels.
    let mut file =
        tempfile::NamedTempFile::new_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target")).unwrap();
    file.write_all(&vec![7; len]).unwrap();
    file
}

fn open(path: &Path, read_only: bool, cache: CacheMode) -> Result<Image, ImageError> {
    Image::open(&ImageOptions { path: path.to_owned(), format: ImageFormat::Raw, read_only, cache })
}

#[test]
fn an_image_knows_its_size_and_alignment() {
    let file = file(8192);
    for cache in [CacheMode::None, CacheMode::Writeback, CacheMode::Writethrough] {
        let image = open(file.path(), false, cache).unwrap();
        assert_eq!(image.len(), 8192);
        assert!(image.logical_block() >= 512 && image.physical_block() >= image.logical_block());
        assert!(image.memory_align().is_power_of_two());
        assert!(cache == CacheMode::None || image.memory_align() == 1);
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let path = Path::new("/nonexistent/disk");
    assert!(matches!(open(path, true, CacheMode::None), Err(ImageError::Open { .. })));
    assert!(!open(path, true, CacheMode::None).unwrap_err().is_hosts_fault());
    assert!(matches!(open(Path::new("/dev/null"), true, CacheMode::None), Err(ImageError::Kind(_))));
    assert!(matches!(open(file(0).path(), true, CacheMode::Writeback), Err(ImageError::Empty(_))));
    let odd = open(file(1000).path(), true, CacheMode::Writeback).unwrap_err();
    assert!(matches!(odd, ImageError::Size { len: 1000, unit: 512, .. }));
    assert!(odd.to_string().contains("1024"), "{odd}");
}

#[test]
fn a_size_is_taken_again_when_asked_for() {
    let file = file(8192);
    let image = open(file.path(), false, CacheMode::Writeback).unwrap();
    assert_eq!(image.topology(), Topology::default());
    assert!(!image.reload().unwrap());
    for (len, changed) in
        [(16384, Some(true)), (512, Some(true)), (512, Some(false)), (0, None), (1000, None)]
    {
        let before = image.len();
        file.as_file().set_len(len).unwrap();
        assert_eq!(image.reload().ok(), changed, "{len}");
        assert_eq!(image.len(), if changed.is_some() { len } else { before });
    }
}

#[test]
fn writers_exclude_everybody_and_readers_only_writers() {
    let file = file(512);
    let writer = open(file.path(), false, CacheMode::Writeback).unwrap();
    // The lock is the open file's, not the process's: it also holds against ourselves, who are not named.
    assert!(matches!(open(file.path(), true, CacheMode::Writeback), Err(ImageError::Locked { .. })));
    drop(writer);
    let _reader = open(file.path(), true, CacheMode::Writeback).unwrap();
    let _other = open(file.path(), true, CacheMode::Writeback).unwrap();
}

#[test]
fn memory_is_served_at_once_and_a_disk_is_not_waited_for() {
    let is_nonblocking = |path: &Path| {
        let image = open(path, true, CacheMode::Writeback).unwrap();
        fcntl_getfl(image.file()).unwrap().contains(OFlags::NONBLOCK)
    };
    assert!(!is_nonblocking(file(512).path()));
    let Ok(mut in_memory) = tempfile::NamedTempFile::new_in("/dev/shm") else { return };
    in_memory.write_all(&[7; 512]).unwrap();
    assert!(is_nonblocking(in_memory.path()));
}
