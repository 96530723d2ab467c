//! The terminal in front of the person.

use std::io::{self, IsTerminal};

use caisson_proto::cli::WindowSize;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

nix::ioctl_read_bad!(get_window_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);

/// Whether standard input is a terminal.
pub fn is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// The terminal's size; `None` if there is no terminal.
pub fn size() -> Option<WindowSize> {
    let mut size = nix::libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the ioctl writes one winsize, which lives until the call returns.
    unsafe { get_window_size(nix::libc::STDOUT_FILENO, &raw mut size) }.ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| WindowSize {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    })
}

/// The terminal passes every key on; as it was again when this is dropped.
pub struct RawMode(Termios);

impl RawMode {
    /// Sets the terminal of standard input to raw mode.
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}
