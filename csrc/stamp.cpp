// What a library was built from, as text in its bytes: compared before anything of it runs.
extern "C" {
__attribute__((visibility("default"), used)) extern const char dynmm_kernels_stamp[];
const char dynmm_kernels_stamp[] = DYNMM_STAMP;
}
