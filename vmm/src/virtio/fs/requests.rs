//! The requests of a share, each checked and then passed through.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, ZeroCopyReader, ZeroCopyWriter,
};

use super::identity::Identity;
use super::share::{Share, closed, full, root};

/// The most bytes of directory entries in one answer.
const MOST_ENTRIES: u32 = 1 << 20;
/// The longest name (`NAME_MAX`).
const LONGEST_NAME: usize = 255;
/// What is agreed upon at `FUSE_INIT`, if the guest can do it, beside what the passthrough asks for: 1 MiB of
/// data in a request, and cached pages that go when a file's size or time changes on the host.
const WANTED: [FsOptions; 5] = [
    FsOptions::ASYNC_READ,
    FsOptions::BIG_WRITES,
    FsOptions::MAX_PAGES,
    FsOptions::PARALLEL_DIROPS,
    FsOptions::AUTO_INVAL_DATA,
];

/// The flags that a file is opened with on the host, of those that the guest states. Of the others,
/// `O_DIRECT` asks for aligned buffers: the guest has bypassed its own cache, and the host's is no concern of
/// its. `O_PATH`, `O_TMPFILE` and `O_ASYNC` are of no use over FUSE, and who owns a file alone may ask for
/// `O_NOATIME`.
fn permitted(flags: u32) -> u32 {
    const PERMITTED: i32 = libc::O_ACCMODE
        | libc::O_CREAT
        | libc::O_EXCL
        | libc::O_TRUNC
        | libc::O_APPEND
        | libc::O_NONBLOCK
        | libc::O_SYNC
        | libc::O_DIRECTORY
        | libc::O_NOFOLLOW;
    flags & PERMITTED as u32
}

/// Refuses what is not one component of a path below the directory it is looked up in.
fn component(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    let error = match bytes {
        b"" | b"." | b".." => libc::EINVAL,
        _ if bytes.contains(&b'/') => libc::EINVAL,
        _ if bytes.len() > LONGEST_NAME => libc::ENAMETOOLONG,
        _ => return Ok(()),
    };
    Err(io::Error::from_raw_os_error(error))
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let wanted = WANTED
            .into_iter()
            .fold(FsOptions::empty(), |all, option| all | option);
        let listing = FsOptions::DO_READDIRPLUS | FsOptions::READDIRPLUS_AUTO;
        Ok(self.files.init(capable & listing)? | wanted)
    }

    /// The guest unmounts: what it holds goes, the root stays for the next mount.
    fn destroy(&self) {
        let (inodes, handles) = self.ledger.clear();
        for (handle, inode) in handles {
            // A handle that the passthrough does not know is as released as it can be.
            let _ = self
                .files
                .release(&root(), inode, 0, handle, false, false, None);
        }
        self.files.batch_forget(&root(), inodes);
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        self.looked_up(self.files.lookup(&root(), parent, name)?)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.ledger.forget(inode, count);
        self.files.forget(&root(), inode, count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in &requests {
            self.ledger.forget(*inode, *count);
        }
        self.files.batch_forget(&root(), requests);
    }

    fn getattr(
        &self,
        _: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.files.getattr(&root(), inode, handle)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.files.setattr(&root(), inode, attr, handle, valid)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.files.readlink(&root(), inode)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        component(name)?;
        let _as = Identity::assume(ctx.uid, ctx.gid)?;
        self.looked_up(self.files.symlink(&root(), linkname, parent, name)?)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        component(name)?;
        let _as = Identity::assume(ctx.uid, ctx.gid)?;
        self.looked_up(self.files.mknod(&root(), parent, name, mode, rdev, umask)?)
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        component(name)?;
        let _as = Identity::assume(ctx.uid, ctx.gid)?;
        self.looked_up(self.files.mkdir(&root(), parent, name, mode, umask)?)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.files.unlink(&root(), parent, name)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        component(name)?;
        self.files.rmdir(&root(), parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        component(oldname)?;
        component(newname)?;
        // Root may not be known where the host maps the IDs of a mount.
        let _as = Identity::assume(ctx.uid, ctx.gid)?;
        self.files
            .rename(&root(), olddir, oldname, newdir, newname, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        component(newname)?;
        let _as = Identity::assume(ctx.uid, ctx.gid)?;
        let entry = if self.root.is_none() {
            self.link_by_path(inode, newparent, newname)?
        } else {
            self.files.link(&root(), inode, newparent, newname)?
        };
        self.looked_up(entry)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = permitted(flags);
        let (handle, (options, passthrough)) = self.opened(inode, flags, || {
            let (handle, options, passthrough) =
                self.files.open(&root(), inode, flags, fuse_flags)?;
            Ok((handle, (options, passthrough)))
        })?;
        Ok((handle, options, passthrough))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        component(name)?;
        args.flags = permitted(args.flags);
        if !self.ledger.has_room() {
            return Err(full());
        }
        let _as = Identity::assume(ctx.uid, ctx.gid)?;
        let (entry, handle, options, passthrough) =
            self.files.create(&root(), parent, name, args)?;
        let inode = entry.inode;
        match self.looked_up(entry) {
            Ok(entry) => {
                if let Some(handle) = handle {
                    self.ledger.open(handle, inode, args.flags);
                }
                Ok((entry, handle, options, passthrough))
            }
            Err(error) => {
                if let Some(handle) = handle {
                    self.files
                        .release(&root(), inode, 0, handle, false, false, None)?;
                }
                Err(error)
            }
        }
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        // None that the guest can change matters to a read: see `Share::writer` for why they stay what they were.
        let flags = self.ledger.opened(handle).ok_or_else(closed)?.flags;
        self.files
            .read(&root(), inode, handle, w, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (handle, flags) = self.writer(handle, flags)?;
        self.files.write(
            &root(),
            inode,
            handle,
            r,
            size,
            offset,
            lock_owner,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.files.flush(&root(), inode, handle, lock_owner)
    }

    fn fsync(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.files.fsync(&root(), inode, datasync, handle)
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.files
            .fallocate(&root(), inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.files.release(
            &root(),
            inode,
            flags,
            handle,
            flush,
            flock_release,
            lock_owner,
        )?;
        self.released(inode, handle);
        Ok(())
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        self.files.statfs(&root(), inode)
    }

    fn opendir(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = permitted(flags) | libc::O_DIRECTORY as u32;
        self.opened(inode, flags, || self.files.opendir(&root(), inode, flags))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = size.min(MOST_ENTRIES);
        self.files
            .readdir(&root(), inode, handle, size, offset, add_entry)
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let size = size.min(MOST_ENTRIES);
        self.files
            .readdirplus(&root(), inode, handle, size, offset, &mut |name, entry| {
                let inode = entry.inode;
                self.looked_up(entry)?;
                let added = add_entry(name, entry);
                if !matches!(added, Ok(1..)) {
                    // Not given to the guest. The passthrough takes its lookup back where there was no room,
                    // but not where there was an error.
                    self.ledger.forget(inode, 1);
                }
                if added.is_err() {
                    self.files.forget(&root(), inode, 1);
                }
                added
            })
    }

    fn fsyncdir(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.files.fsyncdir(&root(), inode, datasync, handle)
    }

    fn releasedir(&self, _: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.files.releasedir(&root(), inode, flags, handle)?;
        self.released(inode, handle);
        Ok(())
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.files.access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.files.lseek(&root(), inode, handle, offset, whence)
    }
}
