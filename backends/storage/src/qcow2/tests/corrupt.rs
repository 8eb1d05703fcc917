//! Images that are not what they say.

use super::*;

/// An image with tables, data, a zero cluster and a backing file, of small clusters: a change anywhere matters.
fn valid(place: &Path) -> Vec<u8> {
    let path = place.join("image");
    std::fs::write(place.join("base"), pattern(9, 100_000)).unwrap();
    New { backing: Some(("base", "raw")), ..New::of(256 << 10, 512) }.make(&path);
    let chain = chain::open(&path, false, CacheMode::Writeback).unwrap();
    for at in [0u64, 5000, 70_000, 200_000] {
        chain.access.write(&pattern(at, 3000), at).unwrap();
    }
    chain.access.write_zeroes(8192, 4096).unwrap();
    chain.access.flush().unwrap();
    drop(chain);
    std::fs::read(&path).unwrap()
}

/// Opens it and does to it what a guest would. Errors are fine; panics, hangs and allocations without bound are not.
fn use_it(path: &Path, read_only: bool) {
    let options = ImageOptions {
        path: path.to_owned(),
        format: ImageFormat::Qcow2,
        read_only,
        cache: CacheMode::Writeback,
    };
    let image = match Image::open(&options) {
        Ok(image) => Arc::new(image),
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "{error}");
            return;
        }
    };
    let len = image.len();
    let mut engine = Engine::new(image, 8).unwrap();
    for at in (0..len.min(512 << 10)).step_by(8192) {
        let _ = read(&mut engine, at, 8192.min(len - at) as usize);
    }
    for at in [len / 2 / 512 * 512, len - 512] {
        let _ = read(&mut engine, at, 512);
        if !read_only {
            let _ = write(&mut engine, at, &[5; 512], false);
        }
    }
    if !read_only {
        for at in (0..len.min(64 << 10)).step_by(4096) {
            let _ = write(&mut engine, at, &[6; 2048], at % 8192 == 0);
            let op = RangeOp::WriteZeroes { unmap: at % 8192 == 0, durable: false };
            let _ = range(&mut engine, op, at, 2048.min(len - at));
        }
    }
    let _ = range(&mut engine, RangeOp::Discard, 0, len);
    engine.flush(0);
    let _ = done(&mut engine);
}

#[test]
fn a_file_that_is_cut_off_anywhere() {
    let place = directory();
    let bytes = valid(place.path());
    let path = place.path().join("image");
    for len in (0..bytes.len()).step_by(251) {
        std::fs::write(&path, &bytes[..len]).unwrap();
        use_it(&path, len % 2 == 0);
    }
}

#[test]
fn every_word_of_the_header_at_its_limits() {
    let place = directory();
    let bytes = valid(place.path());
    let path = place.path().join("image");
    for at in (0..256).step_by(4) {
        for word in [[0; 4], [0xff; 4], [0, 0, 0, 1], [0x7f, 0xff, 0xff, 0xff], [0, 1, 0, 0], [0, 0, 2, 0]] {
            let mut bytes = bytes.clone();
            bytes[at..at + 4].copy_from_slice(&word);
            std::fs::write(&path, &bytes).unwrap();
            use_it(&path, at % 8 == 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn any_bytes_anywhere(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        words in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 0..4),
        read_only: bool,
    ) {
        let place = directory();
        let mut bytes = valid(place.path());
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        // Entries of tables that lead to other places of the file: loops, and tables that are something else as well.
        for (at, target, copied) in words {
            let (at, target) = (at.index(bytes.len() / 8) * 8, target.index(bytes.len() / 512) as u64 * 512);
            let word = target | u64::from(copied) << 63;
            bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
        }
        let path = place.path().join("image");
        std::fs::write(&path, &bytes).unwrap();
        use_it(&path, read_only);
    }
}

/// Names that an image of a chain may give for its backing file; the last two are none of the images.
const NAMES: [&str; 7] = ["image", "one", "two", "three", "four", "base", "missing"];
const IMAGES: usize = 5;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    /// Chains that end, that lead back to themselves, to nothing, or to something of another format or size.
    #[test]
    fn any_chain(
        links in prop::collection::vec((prop::option::weighted(0.9, 0..NAMES.len()), any::<bool>(), 0u64..9), IMAGES),
        changes in prop::collection::vec((0..IMAGES, 0usize..400, any::<u8>()), 0..3),
        read_only: bool,
    ) {
        let place = directory();
        std::fs::write(place.path().join("base"), pattern(9, 100_000)).unwrap();
        for (name, (backing, is_qcow2, size)) in NAMES.iter().zip(links) {
            let format = if is_qcow2 { "qcow2" } else { "raw" };
            let backing = backing.map(|to| (NAMES[to], format));
            New { backing, ..New::of(size << 16, 512) }.make(&place.path().join(name));
        }
        for (image, at, byte) in changes {
            let path = place.path().join(NAMES[image]);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at] ^= byte;
            std::fs::write(&path, bytes).unwrap();
        }
        use_it(&place.path().join("image"), read_only);
    }
}
