//! The ports by which a guest powers off and resets: ACPI's hardware-reduced sleep and reset registers
//! (ACPI 6.5, 4.8.3.7 and 4.8.3.6), and the keyboard controller's reset command for kernels that fall back to it.

use crate::arch::x86_64::acpi::SLEEP_TYPE_S5;
use crate::bus::BusDevice;

/// What the guest asks of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerRequest {
    PowerOff,
    Reset,
}

/// Sleep control register; the next port is the sleep status register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
pub const RESET_PORT: u16 = 0x602;
pub const PORTS: u16 = 3;

/// What the FADT tells the guest to write to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// Sleep control, sleep status and reset.
pub struct PowerPorts<F>(pub F);

impl<F: Fn(PowerRequest) + Send + Sync> BusDevice for PowerPorts<F> {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Sleep control reads as written only where it is written back; WAK_STS is never set: nothing wakes from S5.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let sleep_type = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        match SLEEP_CONTROL_PORT + offset as u16 {
            SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 => {
                (self.0)(PowerRequest::PowerOff);
            }
            RESET_PORT if value == RESET_VALUE => (self.0)(PowerRequest::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller's command port: present only for its reset command.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;

const KEYBOARD_PULSE_RESET: u8 = 0xfe;

pub struct KeyboardReset<F>(pub F);

impl<F: Fn(PowerRequest) + Send + Sync> BusDevice for KeyboardReset<F> {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Input buffer empty: a kernel that wants to reset need not wait for it.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [KEYBOARD_PULSE_RESET] {
            (self.0)(PowerRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn only_the_agreed_values_do_anything() {
        let asked = Mutex::new(Vec::new());
        let ports = PowerPorts(|request| asked.lock().unwrap().push(request));
        for value in 0..=255 {
            ports.write(0, &[value]);
        }
        // SLP_EN with S5, whatever the reserved bits say.
        assert_eq!(asked.lock().unwrap().len(), 16);
        assert!(asked.lock().unwrap().iter().all(|request| *request == PowerRequest::PowerOff));
        asked.lock().unwrap().clear();
        for value in 0..=255 {
            ports.write(2, &[value]);
        }
        ports.write(0, &[0x34, 0]);
        ports.write(1, &[0xff]);
        assert_eq!(*asked.lock().unwrap(), [PowerRequest::Reset]);
    }

    #[test]
    fn the_keyboard_controller_resets_and_nothing_else() {
        let asked = Mutex::new(0);
        let port = KeyboardReset(|_| *asked.lock().unwrap() += 1);
        for value in 0..=255 {
            port.write(0, &[value]);
        }
        assert_eq!(*asked.lock().unwrap(), 1);
    }
}
