use super::*;

/// What 'qemu-img create -f qcow2 -b base.raw -F raw x 1G' begins with, in its essentials.
fn image() -> Vec<u8> {
    let mut bytes = vec![0; 4 * 65536];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(8, &0x1d8u64.to_be_bytes());
    put(16, &8u32.to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 30).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &0x30000u64.to_be_bytes());
    put(48, &0x10000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &112u32.to_be_bytes());
    put(112, &0xe279_2acau32.to_be_bytes());
    put(116, &3u32.to_be_bytes());
    put(120, b"raw");
    put(128, &0x6803_f857u32.to_be_bytes());
    put(132, &96u32.to_be_bytes());
    put(0x1d8, b"base.raw");
    bytes
}

fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
    Header::parse(bytes, bytes.len() as u64)
}

fn with(at: usize, value: &[u8]) -> Result<Header, HeaderError> {
    let mut bytes = image();
    bytes[at..at + value.len()].copy_from_slice(value);
    parse(&bytes)
}

#[test]
fn a_good_header_is_understood() {
    let header = parse(&image()).unwrap();
    assert_eq!((header.cluster_bits, header.size, header.refcount_order), (16, 1 << 30, 4));
    assert_eq!(header.l1_range(), 0x30000..0x30010);
    assert_eq!(header.reftable_range(), 0x10000..0x20000);
    let backing = Backing { name: "base.raw".into(), format: Some("raw".into()) };
    assert_eq!(header.backing, Some(backing));
}

#[test]
fn features_are_refused_by_name() {
    for (bits, error) in [
        (1u64, HeaderError::Dirty),
        (2, HeaderError::Corrupt),
        (3, HeaderError::Corrupt),
        (4, HeaderError::DataFile),
        (8, HeaderError::CompressionType),
        (16, HeaderError::ExtendedL2),
        (32, HeaderError::Unknown(32)),
    ] {
        assert_eq!(with(72, &bits.to_be_bytes()), Err(error));
    }
    assert_eq!(with(32, &2u32.to_be_bytes()), Err(HeaderError::Encrypted));
    assert_eq!(with(4, &1u32.to_be_bytes()), Err(HeaderError::Version(1)));
    assert_eq!(parse(b"MZ"), Err(HeaderError::Magic([b'M', b'Z', 0, 0])));
    assert_eq!(parse(b"KDMV\x01"), Err(HeaderError::Other("a VMDK image")));
    assert_eq!(parse(b""), Err(HeaderError::Empty));
    assert_eq!(parse(&image()[..60]), Err(HeaderError::Short(60)));
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    for (at, value) in [
        (20, &8u32.to_be_bytes()[..]),
        (20, &22u32.to_be_bytes()),
        (24, &u64::MAX.to_be_bytes()),
        (36, &1u32.to_be_bytes()),
        (36, &u32::MAX.to_be_bytes()),
        (40, &0x30200u64.to_be_bytes()),
        (40, &0x40000u64.to_be_bytes()),
        (40, &(u64::MAX - 0xffff).to_be_bytes()),
        (48, &0u64.to_be_bytes()),
        (56, &0u32.to_be_bytes()),
        (56, &u32::MAX.to_be_bytes()),
        (96, &7u32.to_be_bytes()),
        (100, &96u32.to_be_bytes()),
        (100, &0x20000u32.to_be_bytes()),
        (116, &u32::MAX.to_be_bytes()),
        (132, &97u32.to_be_bytes()),
        (8, &u64::MAX.to_be_bytes()),
        (8, &64u64.to_be_bytes()),
        (16, &1024u32.to_be_bytes()),
        (0x1d8, &[0xff]),
        (0x1d8, &[0]),
    ] {
        let outcome = with(at, value);
        assert!(matches!(outcome, Err(HeaderError::Damaged(_))), "{value:x?} at {at}: {outcome:?}");
    }
}
