// A test for each target that is named: its seeds, each run once. A file for `include!`, where the targets are above.

macro_rules! seeds {
    ($($target:ident)*) => {
        $(#[test]
        fn $target() {
            let directories = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
            let mut all = directories.map(|above| above.join("tests/fuzz/seeds"));
            let seeds = all.find(|seeds| seeds.is_dir()).unwrap().join(stringify!($target));
            let mut count = 0;
            for entry in std::fs::read_dir(&seeds).unwrap() {
                super::$target(&std::fs::read(entry.unwrap().path()).unwrap());
                count += 1;
            }
            assert!(count > 0, "{} is empty", seeds.display());
        })*
    };
}
