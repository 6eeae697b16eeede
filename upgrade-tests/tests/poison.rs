//! A request that kills its server parks its volume; the rest go on.

mod common;

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use common::{assert_clean, config};
use nebd_upgrade_tests::campaign::{Campaign, CampaignConfig};
use nebd_upgrade_tests::client_device::{AttachOptions, ClientDevice};
use nebd_upgrade_tests::device::{Device, Done, Io, Op};

/// Beyond the end of every other volume: the switch knows no volumes.
const POISON: u64 = 48 << 20;

fn write(device: &mut ClientDevice, tag: u64, offset: u64) {
    let buffers = vec![vec![7; 4096]];
    device.submit(tag, Io { op: Op::Write, fua: false, offset, length: 4096, buffers }).unwrap();
}

fn wait(device: &mut ClientDevice) -> Done {
    let mut done = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(30);
    while done.is_empty() {
        assert!(Instant::now() < deadline, "the request is not answered");
        device.poll(&mut done).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    done.remove(0)
}

#[test]
fn a_poison_request_parks_its_volume_and_the_rest_go_on() {
    let environment = vec![("NEBD_TEST_POISON".into(), POISON.to_string())];
    let campaign = CampaignConfig { environment, ..config("file", 3, 0) };
    let campaign = Campaign::start(campaign).unwrap();
    let admin = campaign.host().admin().unwrap();
    admin.create("file:poisoned", 64 << 20, 4096).unwrap();
    let how = AttachOptions::default();
    let mut device = ClientDevice::open(campaign.host().socket(), "file:poisoned", &how).unwrap();
    let load = campaign.load().unwrap();

    let parked = || admin.volume("file:poisoned").unwrap().parked;
    let others_go_on = || {
        let before: Vec<u64> = load.gauges().iter().map(|g| g.completions.load(SeqCst)).collect();
        let went_on = campaign.host().wait_for("the others' IO", |_| {
            let gauges = load.gauges().iter().zip(&before);
            gauges.into_iter().all(|(g, before)| g.completions.load(SeqCst) > before + 200)
                || load.problems() > 0
        });
        // A volume that was parked by mistake is the likely reason; say so.
        let volumes = admin.status().unwrap().volumes;
        went_on.unwrap_or_else(|error| panic!("{error}\n{volumes:#?}"));
        assert_eq!(load.problems(), 0);
    };

    write(&mut device, 1, POISON);
    device.poll(&mut Vec::new()).unwrap(); // kicks
    campaign.host().wait_for("the volume to be parked", |_| parked()).unwrap();
    others_go_on();
    // Another chance, which it does not use; the answer to this may die with the server.
    let _ = admin.unpark("file:poisoned");
    campaign.host().wait_for("the volume to be parked again", |_| parked()).unwrap();
    others_go_on();
    admin.abort("file:poisoned").unwrap();
    let done = wait(&mut device);
    assert_eq!((done.tag, done.errno), (1, 5), "the aborted request fails with EIO");
    assert!(!parked());
    write(&mut device, 2, 0);
    let done = wait(&mut device);
    assert_eq!((done.tag, done.errno), (2, 0), "the volume serves again");

    drop(device);
    assert_clean(&campaign.finish(), 0);
}
