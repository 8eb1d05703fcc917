//! MSRs that a stock kernel expects firmware to have set.

use kvm_bindings::kvm_msr_entry;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back by default: with them off, Linux up to 6.2 gives up PAT too.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// For every vCPU, at power-on.
pub fn initial() -> Vec<kvm_msr_entry> {
    [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK)]
        .into_iter()
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
        .collect()
}
