//! What goes in comes out, for each format.
#![allow(clippy::unwrap_used, reason = "a helper of tests is a test")]

use std::collections::BTreeMap;

use crate::common::{Custom, LIMITS, Order};
use bytes::Bytes;
use polymq_serializers::Format;
use proptest::prelude::*;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Event {
    Opened,
    Paid(u32),
    Moved { from: String, to: Option<i64> },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Everything {
    flag: bool,
    letter: char,
    small: i8,
    large: u64,
    fraction: f64,
    name: String,
    events: Vec<Event>,
    map: BTreeMap<String, (u8, Option<i32>)>,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Opened),
        any::<u32>().prop_map(Event::Paid),
        (any::<String>(), any::<Option<i64>>()).prop_map(|(from, to)| Event::Moved { from, to }),
    ]
}

fn everything() -> impl Strategy<Value = Everything> {
    let scalars = (any::<bool>(), any::<char>(), any::<i8>(), any::<u64>(), -1e300..1e300);
    let rest = (
        any::<String>(),
        prop::collection::vec(event(), 0..8),
        prop::collection::btree_map(any::<String>(), any::<(u8, Option<i32>)>(), 0..8),
    );
    (scalars, rest).prop_map(|((flag, letter, small, large, fraction), (name, events, map))| Everything {
        flag,
        letter,
        small,
        large,
        fraction,
        name,
        events,
        map,
    })
}

fn back<T: Serialize + DeserializeOwned>(format: &Format, value: &T) -> T {
    let body = format.encode(value, &LIMITS).unwrap();
    format.decode(&body, &LIMITS).unwrap()
}

macro_rules! scalars_come_back {
    ($value:expr, $($scalar:expr),*) => { $( prop_assert_eq!(&back(&Format::TEXT, &$scalar), &$scalar); )* };
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Wrapped<T>(T);

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn structured_formats(value in everything()) {
        let custom = Format::custom(Custom::arc("own", "application/own", 100));
        // MessagePack keeps every bit of a float; serde_json may differ in the last one.
        prop_assert_eq!(&back(&Format::MESSAGE_PACK, &value), &value);
        prop_assert_eq!(&back(&custom, &value), &value);
        let json = back(&Format::JSON, &value);
        prop_assert!((json.fraction - value.fraction).abs() <= value.fraction.abs() * 1e-15);
        prop_assert_eq!(Everything { fraction: 0.0, ..json }, Everything { fraction: 0.0, ..value });
    }

    #[test]
    fn text(string in any::<String>(), scalars in any::<(char, bool, u8, i16, u32, i64, u128, i128)>(), float in any::<f64>()) {
        let (a, b, c, d, e, f, g, h) = scalars;
        scalars_come_back!(value, string, a, b, c, d, e, f, g, h, Wrapped(h));
        prop_assert_eq!(&Format::TEXT.encode(&string, &LIMITS).unwrap()[..], string.as_bytes());
        let same = back(&Format::TEXT, &float);
        prop_assert!(same == float || (same.is_nan() && float.is_nan()));
    }

    #[test]
    fn bytes_are_verbatim(bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
        let shared = Bytes::from(bytes.clone());
        prop_assert_eq!(&Format::BYTES.encode(&bytes, &LIMITS).unwrap(), &shared);
        prop_assert_eq!(&Format::BYTES.encode(&bytes[..], &LIMITS).unwrap(), &shared);
        prop_assert_eq!(&Format::BYTES.encode(&shared, &LIMITS).unwrap(), &shared);
        prop_assert_eq!(&back(&Format::BYTES, &bytes), &bytes);
        prop_assert_eq!(&back(&Format::BYTES, &shared), &shared);
        prop_assert_eq!(&back(&Format::BYTES, &Wrapped(shared.clone())).0, &shared);
    }

    #[test]
    fn bodies_are_those_of_the_format_libraries(text in "[a-z]{0,600}") {
        let order = Order { id: 1, note: Some(text), lines: vec![] };
        prop_assert_eq!(&Format::JSON.encode(&order, &LIMITS).unwrap()[..], serde_json::to_vec(&order).unwrap());
        prop_assert_eq!(
            &Format::MESSAGE_PACK.encode(&order, &LIMITS).unwrap()[..],
            rmp_serde::to_vec_named(&order).unwrap()
        );
    }
}

#[test]
fn arrays_unsized_values_and_sizes_around_the_scratch() {
    assert_eq!(back(&Format::BYTES, &[1u8, 2, 3]), [1, 2, 3]);
    assert_eq!(&Format::TEXT.encode("ready", &LIMITS).unwrap()[..], b"ready");
    for len in [0, 1, 253, 254, 255, 256, 257, 1_023, 1_024, 1_025, 100_000] {
        let text = "x".repeat(len);
        for format in [Format::JSON, Format::MESSAGE_PACK, Format::TEXT] {
            assert_eq!(back(&format, &text), text, "{format} {len}");
        }
    }
}

#[test]
fn fields_may_be_added_and_reordered_in_both_structured_formats() {
    #[derive(Serialize)]
    struct Newer {
        lines: Vec<(String, i32)>,
        added: u8,
        id: u64,
    }
    for format in [Format::JSON, Format::MESSAGE_PACK] {
        let body = format.encode(&Newer { lines: vec![], added: 1, id: 9 }, &LIMITS).unwrap();
        let order: Order = format.decode(&body, &LIMITS).unwrap();
        assert_eq!(order, Order { id: 9, note: None, lines: vec![] });
    }
}
