//! What a vCPU's port and memory-mapped accesses reach.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use caisson_vmm_protocol::ExitReason;
use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;
use super::ending::Ending;
use crate::arch::{acpi::S5_TYPE, layout};
use crate::template::SerialPort;
use crate::transport::mmio::{MmioTransport, WindowState};

/// The sleep control register's fields (ACPI 6.5 §4.8.3.7): the type and the bit that starts it.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;
/// The events that pvpanic reports and offers.
const PANICKED: u8 = 1;

/// COM1's interrupt line.
pub struct SerialLine(pub EventFd);

impl Trigger for SerialLine {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

type Com1 = Serial<SerialLine, NoEvents, Console>;

/// The machine's ports and windows.
pub struct Bus {
    serial: Mutex<Com1>,
    windows: Vec<Mutex<MmioTransport>>,
    ending: Arc<Ending>,
}

impl Bus {
    /// A bus with COM1 and these virtio-mmio windows, in order.
    pub fn new(serial: Com1, windows: Vec<MmioTransport>, ending: Arc<Ending>) -> Self {
        Self {
            serial: Mutex::new(serial),
            windows: windows.into_iter().map(Mutex::new).collect(),
            ending,
        }
    }

    /// A port read. Where nothing is, all bits are set, as on a real bus.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::SERIAL_PORT..=SERIAL_END => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    *byte = serial.read((port - layout::SERIAL_PORT) as u8);
                }
            }
            layout::PVPANIC_PORT => data.fill(PANICKED),
            layout::SLEEP_CONTROL_PORT | layout::SLEEP_STATUS_PORT => data.fill(0),
            _ => {}
        }
    }

    /// A port write. Where nothing is, nothing happens.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match port {
            layout::SERIAL_PORT..=SERIAL_END => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    // A console that cannot be written or a lost interrupt is no reason to end a pod.
                    let _ = serial.write((port - layout::SERIAL_PORT) as u8, *byte);
                }
            }
            layout::PVPANIC_PORT if data.iter().any(|byte| byte & PANICKED != 0) => {
                self.ending.end(ExitReason::Panicked);
            }
            layout::SLEEP_CONTROL_PORT => {
                let powers_off = |byte: &u8| {
                    byte & SLEEP_ENABLE != 0
                        && (byte >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == S5_TYPE
                };
                if data.iter().any(powers_off) {
                    self.ending.end(ExitReason::PoweredOff);
                }
            }
            layout::RESET_PORT if data.contains(&layout::RESET_VALUE) => {
                self.ending.end(ExitReason::Reset);
            }
            layout::I8042_PORT if data.contains(&layout::I8042_RESET) => {
                self.ending.end(ExitReason::Reset);
            }
            _ => {}
        }
    }

    /// A memory-mapped read. Of windows the guest reads by itself where KVM has their registers.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((window, offset)) => window.registers().read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A memory-mapped write.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((mut window, offset)) = self.window(address) {
            window.write(offset, data);
        }
    }

    /// Parks the devices. The vCPUs are parked already.
    pub fn pause(&self) {
        self.windows.iter().for_each(|window| lock(window).pause());
    }

    /// Lets the devices go on.
    pub fn resume(&self) {
        self.windows.iter().for_each(|window| lock(window).resume());
    }

    /// Stops the devices and writes the console's last line. The vCPUs are gone.
    pub fn stop(&self) {
        self.windows.iter().for_each(|window| lock(window).stop());
        lock(&self.serial).writer_mut().finish();
    }

    /// The registers of COM1 and of the windows, in order. The devices are parked.
    pub fn save(&self) -> (SerialPort, Vec<WindowState>) {
        let windows = self.windows.iter().map(|window| lock(window).save());
        (SerialPort(lock(&self.serial).state()), windows.collect())
    }

    fn window(&self, address: u64) -> Option<(MutexGuard<'_, MmioTransport>, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let window = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        let window = self.windows.get(window)?;
        Some((lock(window), offset % layout::VIRTIO_MMIO_SIZE))
    }
}

const SERIAL_END: u16 = layout::SERIAL_PORT + layout::SERIAL_PORTS - 1;

/// A panic in another thread ends the machine by itself; what the lock guards is only looked at until then.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
