use super::*;

#[test]
fn every_struct_and_field_is_asserted() {
    let text = assertions();
    assert!(text.contains("static_assert(sizeof(Unit) == 32, \"Unit: size\");"));
    assert!(text.contains("__INTADDR__(&((AttendParams*)0)->scale_log2) == "));
    assert_eq!(DECLARED.len(), 35);
    // 5 integers after 6 addresses, padded to the alignment of the addresses.
    assert_eq!(size_of::<Layout>(), 6 * 8 + 5 * 4 + 4);
}
