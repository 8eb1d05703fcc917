//! Why a command failed, and the two formats in which it is told (SPC-4, 4.5).

/// What kind of trouble (SPC-4, 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SenseKey {
    NoSense = 0x0,
    NotReady = 0x2,
    MediumError = 0x3,
    HardwareError = 0x4,
    IllegalRequest = 0x5,
    UnitAttention = 0x6,
    DataProtect = 0x7,
    AbortedCommand = 0xb,
    Miscompare = 0xe,
}

/// The field that an ILLEGAL REQUEST is about (SPC-4, 4.5.2.4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// In the CDB; otherwise in the data-out parameters.
    pub in_cdb: bool,
    pub byte: u16,
    /// The field's leftmost bit, where it does not start with its byte.
    pub bit: Option<u8>,
}

impl Field {
    /// The three sense key specific bytes, SKSV set.
    fn encode(self) -> [u8; 3] {
        let bit = self.bit.map_or(0, |bit| 0x08 | (bit & 0x07));
        let [high, low] = self.byte.to_be_bytes();
        [0x80 | (u8::from(self.in_cdb) << 6) | bit, high, low]
    }
}

/// Sense data, before it has a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    pub key: SenseKey,
    /// ADDITIONAL SENSE CODE and its qualifier (SPC-4, 4.5).
    pub code: (u8, u8),
    /// What the INFORMATION field holds: mostly a logical block address.
    pub information: Option<u64>,
    pub field: Option<Field>,
}

const fn sense(key: SenseKey, code: u8, qualifier: u8) -> Sense {
    Sense { key, code: (code, qualifier), information: None, field: None }
}

impl Sense {
    pub const NONE: Self = sense(SenseKey::NoSense, 0x00, 0x00);

    pub const INITIALIZING_COMMAND_REQUIRED: Self = sense(SenseKey::NotReady, 0x04, 0x02);
    pub const MEDIUM_NOT_PRESENT: Self = sense(SenseKey::NotReady, 0x3a, 0x00);
    pub const MEDIUM_NOT_PRESENT_TRAY_CLOSED: Self = sense(SenseKey::NotReady, 0x3a, 0x01);
    pub const MEDIUM_NOT_PRESENT_TRAY_OPEN: Self = sense(SenseKey::NotReady, 0x3a, 0x02);

    pub const WRITE_ERROR: Self = sense(SenseKey::MediumError, 0x0c, 0x00);
    pub const UNRECOVERED_READ_ERROR: Self = sense(SenseKey::MediumError, 0x11, 0x00);

    pub const INTERNAL_TARGET_FAILURE: Self = sense(SenseKey::HardwareError, 0x44, 0x00);
    pub const MEDIA_LOAD_OR_EJECT_FAILED: Self = sense(SenseKey::HardwareError, 0x53, 0x00);

    pub const PARAMETER_LIST_LENGTH_ERROR: Self = sense(SenseKey::IllegalRequest, 0x1a, 0x00);
    pub const INVALID_OPERATION_CODE: Self = sense(SenseKey::IllegalRequest, 0x20, 0x00);
    pub const LBA_OUT_OF_RANGE: Self = sense(SenseKey::IllegalRequest, 0x21, 0x00);
    pub const INVALID_FIELD_IN_CDB: Self = sense(SenseKey::IllegalRequest, 0x24, 0x00);
    pub const LOGICAL_UNIT_NOT_SUPPORTED: Self = sense(SenseKey::IllegalRequest, 0x25, 0x00);
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Self = sense(SenseKey::IllegalRequest, 0x26, 0x00);
    pub const INVALID_RELEASE: Self = sense(SenseKey::IllegalRequest, 0x26, 0x04);
    pub const INCOMPATIBLE_MEDIUM: Self = sense(SenseKey::IllegalRequest, 0x30, 0x02);
    pub const SAVING_NOT_SUPPORTED: Self = sense(SenseKey::IllegalRequest, 0x39, 0x00);
    pub const INVALID_MESSAGE: Self = sense(SenseKey::IllegalRequest, 0x49, 0x00);
    pub const MEDIUM_REMOVAL_PREVENTED: Self = sense(SenseKey::IllegalRequest, 0x53, 0x02);
    pub const INSUFFICIENT_REGISTRATION_RESOURCES: Self = sense(SenseKey::IllegalRequest, 0x55, 0x04);
    pub const ILLEGAL_MODE_FOR_THIS_TRACK: Self = sense(SenseKey::IllegalRequest, 0x64, 0x00);

    pub const WRITE_PROTECTED: Self = sense(SenseKey::DataProtect, 0x27, 0x00);
    pub const SOFTWARE_WRITE_PROTECTED: Self = sense(SenseKey::DataProtect, 0x27, 0x02);
    pub const SPACE_ALLOCATION_FAILED: Self = sense(SenseKey::DataProtect, 0x27, 0x07);

    pub const MISCOMPARE: Self = sense(SenseKey::Miscompare, 0x1d, 0x00);

    pub(crate) const fn unit_attention(code: u8, qualifier: u8) -> Self {
        sense(SenseKey::UnitAttention, code, qualifier)
    }

    /// A medium of `blocks` has no block `lba`, or not all that follow it: the first that is not there is told (SBC-4, 4.18.1).
    pub(crate) fn out_of_range(lba: u64, blocks: u64) -> Self {
        Self::LBA_OUT_OF_RANGE.with_information(Some(lba.max(blocks)))
    }

    const fn at(self, in_cdb: bool, byte: u16, bit: Option<u8>) -> Self {
        Self { field: Some(Field { in_cdb, byte, bit }), ..self }
    }

    /// The field of the CDB that starts with `byte` is wrong.
    pub(crate) const fn cdb(byte: u16) -> Self {
        Self::INVALID_FIELD_IN_CDB.at(true, byte, None)
    }

    /// The field of the CDB whose leftmost bit is `bit` of `byte` is wrong.
    pub(crate) const fn cdb_bit(byte: u16, bit: u8) -> Self {
        Self::INVALID_FIELD_IN_CDB.at(true, byte, Some(bit))
    }

    /// The field of the data-out parameters that starts with `byte` is wrong.
    pub(crate) fn list(byte: usize) -> Self {
        Self::INVALID_FIELD_IN_PARAMETER_LIST.at(false, u16::try_from(byte).unwrap_or(u16::MAX), None)
    }

    /// The field of the data-out parameters whose leftmost bit is `bit` of `byte` is wrong.
    pub(crate) fn list_bit(byte: usize, bit: u8) -> Self {
        Self::INVALID_FIELD_IN_PARAMETER_LIST.at(false, u16::try_from(byte).unwrap_or(u16::MAX), Some(bit))
    }

    pub(crate) const fn with_information(self, information: Option<u64>) -> Self {
        Self { information, ..self }
    }

    /// In the format that the control mode page's D_SENSE bit, or a command's DESC bit, asks for.
    pub fn encode(self, descriptor: bool) -> SenseData {
        if descriptor { self.encode_descriptor() } else { self.encode_fixed() }
    }

    /// Response code 70h (SPC-4, 4.5.3).
    fn encode_fixed(self) -> SenseData {
        let mut data = SenseData::default();
        let bytes = &mut data.bytes;
        bytes[0] = 0x70;
        // What does not fit is left out: VALID stays 0.
        if let Some(information) = self.information.and_then(|value| u32::try_from(value).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        bytes[2] = self.key as u8;
        bytes[7] = 10;
        (bytes[12], bytes[13]) = self.code;
        if let Some(field) = self.field {
            bytes[15..18].copy_from_slice(&field.encode());
        }
        data.len = 18;
        data
    }

    /// Response code 72h (SPC-4, 4.5.2), with the information and the sense key specific descriptors.
    fn encode_descriptor(self) -> SenseData {
        let mut data = SenseData::default();
        data.push(&[0x72, self.key as u8, self.code.0, self.code.1, 0, 0, 0, 0]);
        if let Some(information) = self.information {
            data.push(&[0x00, 0x0a, 0x80, 0x00]);
            data.push(&information.to_be_bytes());
        }
        if let Some(field) = self.field {
            let [a, b, c] = field.encode();
            data.push(&[0x02, 0x06, 0, 0, a, b, c, 0]);
        }
        data.bytes[7] = data.len - 8;
        data
    }
}

/// A header and at most two descriptors.
const MAX_SENSE: usize = 8 + 12 + 8;

/// Sense data as the initiator gets it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenseData {
    bytes: [u8; MAX_SENSE],
    len: u8,
}

impl SenseData {
    fn push(&mut self, more: &[u8]) {
        let start = usize::from(self.len);
        self.bytes[start..start + more.len()].copy_from_slice(more);
        self.len += more.len() as u8;
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_format_has_its_fields_where_spc_has_them() {
        let sense = Sense::cdb_bit(1, 7).with_information(Some(0x1234_5678)).encode(false);
        assert_eq!(
            sense.as_bytes(),
            [0xf0, 0, 5, 0x12, 0x34, 0x56, 0x78, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcf, 0, 1]
        );
    }

    #[test]
    fn fixed_format_leaves_out_information_that_does_not_fit() {
        let sense = Sense::MISCOMPARE.with_information(Some(1 << 32)).encode(false);
        assert_eq!(sense.as_bytes()[0], 0x70);
        assert_eq!(sense.as_bytes()[3..7], [0; 4]);
    }

    #[test]
    fn descriptor_format_has_its_descriptors() {
        let sense = Sense::list(300).with_information(Some(1 << 40)).encode(true);
        assert_eq!(
            sense.as_bytes(),
            [
                0x72, 5, 0x26, 0, 0, 0, 0, 20, // header
                0, 10, 0x80, 0, 0, 0, 1, 0, 0, 0, 0, 0, // information
                2, 6, 0, 0, 0x80, 1, 44, 0, // sense key specific
            ]
        );
        assert_eq!(Sense::NONE.encode(true).as_bytes(), [0x72, 0, 0, 0, 0, 0, 0, 0]);
    }
}
