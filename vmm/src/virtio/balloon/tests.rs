use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use vm_memory::GuestAddress;

use super::super::testing::{Desc, Driver, Interrupts, activation, memory, wait_until};
use super::*;
use crate::template::Overlay;
use crate::virtio::discard::PAGE;

const REPORTING: u64 = 1 << REPORTING_FEATURE;
const PAGES: u32 = PAGE as u32;

/// The drivers of the three queues.
fn drivers(memory: &Memory) -> [Driver; 3] {
    let interrupts: Arc<Interrupts> = Arc::default();
    [0, 1, 2].map(|index| Driver::numbered(memory, 64, index, Arc::clone(&interrupts)))
}

fn start(device: &mut Balloon, drivers: &[Driver; 3]) -> Receiver<String> {
    let (start, failures) = activation(&drivers.each_ref(), REPORTING);
    device.activate(start).unwrap();
    failures
}

#[test]
fn reported_pages_go_back_and_what_is_beside_them_stays() {
    let memory = memory();
    let drivers = drivers(&memory);
    let reports = &drivers[REPORTS];
    reports.put(0x8000, &[7; 0x6000]);
    // Many blocks in one report, as Linux does it: through an indirect table.
    reports.add_indirect(
        0xf000,
        &[Desc::write(0x9000, PAGES), Desc::write(0xb000, 2 * PAGES)],
    );
    let mut device = Balloon::new();
    let failures = start(&mut device, &drivers);
    wait_until("served", || reports.used_index() == 1);
    // Nothing was written: a driver must not take the pages for zeroed.
    assert_eq!(reports.used(), vec![(0, 0)]);
    for (page, byte) in [(8, 7), (9, 0), (10, 7), (11, 0), (12, 0), (13, 7)] {
        let found = reports.bytes(page * 0x1000, PAGE);
        assert!(found.iter().all(|b| *b == byte), "page {page}");
    }
    // They can be used again at once.
    reports.put(0x9000, b"again");
    assert_eq!(reports.bytes(0x9000, 6), b"again\0");
    assert!(failures.try_recv().is_err());
    device.reset();
    let failures = start(&mut device, &drivers);
    assert!(failures.try_recv().is_err());
}

#[test]
fn a_clone_gets_its_templates_pages_back_and_the_template_stays() {
    let file = tempfile::tempfile().unwrap();
    let length = 4 << 20;
    file.set_len(length).unwrap();
    file.write_all_at(&[5; PAGE], 0x8000).unwrap();
    let map = crate::vm::memory::map(&[(GuestAddress(0), length as usize)]).unwrap();
    Overlay::new(&file, length).unwrap().lay(&map).unwrap();
    let memory = Memory::new(map);
    let drivers = drivers(&memory);
    let reports = &drivers[REPORTS];
    // A page of the template's that the clone has written, and one that is the clone's alone.
    let alone = 3 << 20;
    for at in [0x8000, alone] {
        reports.put(at, &[9; PAGE]);
        reports.add(&[Desc::write(at, PAGES)]);
    }
    let mut device = Balloon::new();
    let _failures = start(&mut device, &drivers);
    wait_until("served", || reports.used_index() == 2);
    assert_eq!(reports.bytes(0x8000, PAGE), [5; PAGE]);
    assert_eq!(reports.bytes(alone, PAGE), [0; PAGE]);
    let mut there = [0; PAGE];
    file.read_exact_at(&mut there, 0x8000).unwrap();
    assert_eq!(there, [5; PAGE]);
}

#[test]
fn it_is_never_inflated() {
    let memory = memory();
    let drivers = drivers(&memory);
    let mut device = Balloon::new();
    // All zeros, `num_pages` first.
    assert!(device.config().is_empty());
    // Page frame numbers, which nobody looks at.
    for driver in &drivers[..REPORTS] {
        driver.put(0x9000, &9u32.to_le_bytes());
        driver.add(&[Desc::read(0x9000, 4)]);
    }
    let _failures = start(&mut device, &drivers);
    for driver in &drivers[..REPORTS] {
        wait_until("handed back", || driver.used_index() == 1);
        assert_eq!(driver.used(), vec![(0, 0)]);
        assert_eq!(driver.bytes(0x9000, 4), 9u32.to_le_bytes());
    }
}

#[test]
fn a_driver_that_does_not_report_has_no_queue_for_it() {
    let memory = memory();
    let [inflate, deflate, _] = drivers(&memory);
    inflate.add(&[Desc::read(0x9000, 4)]);
    let mut device = Balloon::new();
    assert_eq!(device.queues(0), 2);
    device
        .activate(activation(&[&inflate, &deflate], 0).0)
        .unwrap();
    wait_until("handed back", || inflate.used_index() == 1);
}

/// Reports this and tells why the machine ended. `prepare` may break what it likes.
fn reason(prepare: impl FnOnce(&Driver)) -> String {
    let memory = memory();
    let drivers = drivers(&memory);
    drivers[REPORTS].put(0x8000, &[7; 0x4000]);
    prepare(&drivers[REPORTS]);
    let mut device = Balloon::new();
    let failures = start(&mut device, &drivers);
    let reason = failures.recv_timeout(Duration::from_secs(30)).unwrap();
    // Nothing is given back of a report with a fault in it.
    assert_eq!(drivers[REPORTS].bytes(0x8000, 0x4000), [7; 0x4000]);
    reason
}

// must-test: memory never returned to the host; a descriptor's bounds not checked against guest memory
#[test]
fn a_report_that_is_not_of_whole_pages_of_memory_is_the_guests_fault() {
    let end = 0x10_0000;
    for (address, len, what) in [
        (0x8001, PAGES, "whole pages"),
        (0x8fff, 1, "whole pages"),
        (0x8000, PAGES - 1, "whole pages"),
        (0x8000, PAGES + 8, "whole pages"),
        (end, PAGES, "not in guest memory"),
        (end - 0x1000, 2 * PAGES, "not in guest memory"),
        (0xd000_0000, PAGES, "not in guest memory"),
        (1 << 40, PAGES, "not in guest memory"),
        (u64::MAX - 0xfff, PAGES, "not in guest memory"),
        (u64::MAX - 0xfff, 2 * PAGES, "not in guest memory"),
        (0x8000, !0xffff, "not in guest memory"),
    ] {
        let reason = reason(|reports| {
            // Behind a good one, which must not go back either.
            reports.add(&[Desc::write(0x9000, PAGES), Desc::write(address, len)]);
        });
        assert!(reason.contains(what), "{address:#x}, {len}: {reason}");
        assert!(reason.contains("virtio-balloon driver broke"), "{reason}");
    }
}

#[test]
fn reports_in_bad_chains_are_the_guests_fault() {
    let text = reason(|reports| {
        reports.add(&[Desc::read(0x8000, PAGES), Desc::write(0x9000, PAGES)]);
    });
    assert!(text.contains("only be read"), "{text}");
    let text = reason(|r| r.add_raw(&[(0x8000, PAGES, 3, 1), (0x9000, PAGES, 3, 0)]));
    assert!(text.contains("loops"), "{text}");
    let text = reason(|r| r.add_raw(&[(0x8000, PAGES, 3, 77)]));
    assert!(text.contains("not there"), "{text}");
    let text = reason(|reports| {
        reports.add_indirect(0xf000, &[Desc::write(0x8000, PAGES); 65]);
    });
    assert!(text.contains("longer than its queue"), "{text}");
    let text = reason(|r| r.set_available_index(4000));
    assert!(text.contains("available ring index"), "{text}");
}

#[test]
fn a_report_of_nothing_is_handed_back() {
    let memory = memory();
    let drivers = drivers(&memory);
    drivers[REPORTS].put(0x8000, &[7; PAGE]);
    drivers[REPORTS].add(&[Desc::write(0x8001, 0), Desc::write(0x8000, 0)]);
    let mut device = Balloon::new();
    let failures = start(&mut device, &drivers);
    wait_until("served", || drivers[REPORTS].used_index() == 1);
    assert_eq!(drivers[REPORTS].bytes(0x8000, PAGE), [7; PAGE]);
    assert!(failures.try_recv().is_err());
}

#[test]
fn rings_that_were_given_back_are_the_guests_own_trouble() {
    let memory = memory();
    let drivers = drivers(&memory);
    let mut device = Balloon::new();
    // All of memory, the rings too: what the device finds there next is zeroes, and an index that went backwards.
    drivers[REPORTS].add(&[Desc::write(0, 0x10_0000)]);
    let failures = start(&mut device, &drivers);
    let reason = failures.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(reason.contains("available ring index"), "{reason}");
    device.reset();
    let drivers = self::drivers(&memory);
    drivers[REPORTS].add(&[Desc::write(0x9000, PAGES)]);
    let _failures = start(&mut device, &drivers);
    wait_until("served", || drivers[REPORTS].used_index() == 1);
}
