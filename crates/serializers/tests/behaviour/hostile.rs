//! Bodies made to overflow the stack or the memory.

use std::fmt;

use crate::common::{Chain, Custom, LIMITS, Nest, Order};
use polymq_serializers::{DecodeError, Format, Limits};
use proptest::prelude::*;
use serde::de::{Deserialize, Deserializer, IgnoredAny, SeqAccess, Visitor};

fn custom() -> Format {
    Format::custom(Custom::arc("own", "application/own", 100))
}

/// `depth` empty lists inside each other.
fn lists(format: &Format, depth: usize) -> Vec<u8> {
    if *format == Format::JSON {
        return [vec![b'['; depth], vec![b']'; depth]].concat();
    }
    let mut body = vec![0x91; depth - 1];
    body.push(0x90);
    body
}

/// Whether this many nested lists decode under this limit; anything but too deep is a failure.
fn decodes(format: &Format, containers: usize, max_depth: usize) -> bool {
    let limits = Limits { max_depth, ..LIMITS };
    match format.decode::<Nest>(&lists(format, containers), &limits) {
        Ok(_) => true,
        Err(DecodeError::TooDeep { max_depth: told, .. }) => {
            assert_eq!(told, max_depth.min(128));
            false
        }
        Err(other) => panic!("{format}: {containers} lists, limit {max_depth}: {other}"),
    }
}

#[test]
fn every_format_draws_the_same_line() {
    for max_depth in [2, 3, 60, 127, 128] {
        for format in [Format::JSON, Format::MESSAGE_PACK] {
            assert!(decodes(&format, max_depth - 1, max_depth), "{format} {max_depth}");
            assert!(!decodes(&format, max_depth, max_depth), "{format} {max_depth}");
            assert!(!decodes(&format, 1_000_000, max_depth), "{format} {max_depth}");
        }
    }
    for format in [Format::JSON, Format::MESSAGE_PACK] {
        assert!(!decodes(&format, 128, usize::MAX), "the ceiling holds");
        assert!(!decodes(&format, 1, 1), "a list is two deep");
        assert!(!decodes(&format, 1, 0));
        let scalar = if format == Format::JSON { &b"7"[..] } else { &[7] };
        assert_eq!(format.decode::<u8>(scalar, &Limits { max_depth: 1, ..LIMITS }).unwrap(), 7);
    }
}

#[test]
fn nesting_through_enums_is_counted() {
    let json = format!("{}\"End\"{}", "{\"Link\":".repeat(100_000), "}".repeat(100_000));
    let link: &[u8] = b"\x81\xa4Link";
    let msgpack = [link.repeat(100_000), b"\xa3End".to_vec()].concat();
    for (format, body) in [(Format::JSON, json.as_bytes()), (Format::MESSAGE_PACK, &msgpack), (custom(), &msgpack)] {
        let refused = format.decode::<Chain>(body, &LIMITS);
        assert!(matches!(refused, Err(DecodeError::TooDeep { .. })), "{format}: {refused:?}");
    }
}

#[test]
fn a_custom_format_without_a_limit_gets_one() {
    let deep = lists(&custom(), 100_000);
    let refused = custom().decode::<Nest>(&deep, &LIMITS).unwrap_err();
    assert!(matches!(refused, DecodeError::TooDeep { max_depth: 128, .. }), "{refused}");
    // A newtype counts there as well as its list.
    assert!(custom().decode::<Nest>(&lists(&custom(), 63), &LIMITS).is_ok());
}

#[test]
fn brackets_in_strings_are_not_nesting() {
    let limits = Limits { max_depth: 3, ..LIMITS };
    let text = r#"[[[[{{{{ \ " [[[["#.repeat(40);
    let body = Format::JSON.encode(&[&text], &limits).unwrap();
    assert_eq!(Format::JSON.decode::<Vec<String>>(&body, &limits).unwrap(), [text]);
}

#[test]
fn skipped_json_does_not_overflow_the_stack() {
    let deep = format!("{{\"id\":1,\"lines\":[],\"more\":{0}{1}}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
    assert_eq!(Format::JSON.decode::<Order>(deep.as_bytes(), &LIMITS).unwrap().id, 1);
    let limits = Limits { max_depth: 127, ..LIMITS };
    assert!(matches!(Format::JSON.decode::<Order>(deep.as_bytes(), &limits), Err(DecodeError::TooDeep { .. })));
}

/// A list that records the largest length that was claimed while it was read.
#[derive(Debug)]
struct Claimed(usize);

impl<'de> Deserialize<'de> for Claimed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Claimed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Claimed, A::Error> {
                let claimed = seq.size_hint().unwrap_or_default();
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Claimed(claimed))
            }
        }
        deserializer.deserialize_seq(List)
    }
}

#[test]
fn a_claimed_length_reserves_nothing() {
    let array32 = b"\xdd\xff\xff\xff\xff";
    let map32 = b"\xdf\xff\xff\xff\xff";
    let str32 = b"\xdb\xff\xff\xff\xff";
    let bin32 = b"\xc6\xff\xff\xff\xff";
    let ext32 = b"\xc9\xff\xff\xff\xff";
    for body in [array32, map32, str32, bin32, ext32] {
        let padded = [&body[..], &[0; 64]].concat();
        for format in [Format::MESSAGE_PACK, custom()] {
            for body in [&body[..], &padded] {
                let refused = format.decode::<Vec<[u64; 16]>>(body, &LIMITS);
                assert!(matches!(refused, Err(DecodeError::Malformed { .. })), "{format}: {refused:?}");
                assert!(format.decode::<Nest>(body, &LIMITS).is_err());
                assert!(format.decode::<String>(body, &LIMITS).is_err());
            }
        }
    }
    // Each level of a recursive type would reserve its own megabyte.
    let nested = array32.repeat(100);
    assert!(matches!(Format::MESSAGE_PACK.decode::<Nest>(&nested, &LIMITS), Err(DecodeError::Malformed { .. })));
    assert!(custom().decode::<Nest>(&nested, &LIMITS).is_err());
}

#[test]
fn a_custom_format_passes_no_size_hint_on() {
    let body = [&b"\xdc\x00\x08"[..], &[1; 8]].concat();
    assert_eq!(custom().decode::<Claimed>(&body, &LIMITS).unwrap().0, 0);
    assert_eq!(Format::MESSAGE_PACK.decode::<Claimed>(&body, &LIMITS).unwrap().0, 8);
}

/// Bytes that are often MessagePack: markers of containers and lengths are frequent.
fn marked_bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![
        4 => any::<u8>(),
        2 => 0x80u8..=0x9f,
        2 => 0xc0u8..=0xdf,
        2 => Just(0u8),
    ];
    prop::collection::vec(byte, 0..200)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn no_body_panics_and_no_claim_exceeds_the_body(body in marked_bytes()) {
        for format in [Format::JSON, Format::MESSAGE_PACK, Format::TEXT, Format::BYTES, custom()] {
            let _ = format.decode::<Order>(&body, &LIMITS);
            let _ = format.decode::<serde_json::Value>(&body, &LIMITS);
            let _ = format.decode::<Nest>(&body, &LIMITS);
            let _ = format.decode::<Chain>(&body, &LIMITS);
            if let Ok(Claimed(claimed)) = format.decode::<Claimed>(&body, &LIMITS) {
                prop_assert!(claimed <= body.len());
            }
        }
    }

    /// The scan before MessagePack refuses nothing that rmp_serde reads whole.
    #[test]
    fn what_is_one_value_is_not_refused(value in prop::collection::vec(any::<(Option<u64>, i64, f32, String, Vec<bool>)>(), 0..20)) {
        for body in [rmp_serde::to_vec(&value).unwrap(), rmp_serde::to_vec_named(&value).unwrap()] {
            prop_assert!(Format::MESSAGE_PACK.decode::<IgnoredAny>(&body, &LIMITS).is_ok());
        }
    }

    #[test]
    fn a_changed_byte_gives_a_value_or_a_typed_error(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let order = Order { id: 300, note: Some("note".into()), lines: vec![("a".into(), -70_000); 3] };
        for format in [Format::JSON, Format::MESSAGE_PACK, custom()] {
            let mut body = format.encode(&order, &LIMITS).unwrap().to_vec();
            let at = at.index(body.len());
            body[at] = byte;
            match format.decode::<Order>(&body, &LIMITS) {
                Ok(_) | Err(DecodeError::Malformed { .. } | DecodeError::TooDeep { .. }) => {}
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
