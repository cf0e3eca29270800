// What llama.cpp's KV cache takes of one sequence of argv[2] tokens, computed argv[3] at a time: loads the model
// argv[1] and a context, windows as llama-server has them (no --swa-full), and its log says the rest.
// g++ -I SRC/include -I SRC/ggml/include llama_cache.cpp -L BUILD/bin -lllama -lggml -lggml-base \
//     -Wl,-rpath,BUILD/bin -o llama_cache, with SRC and BUILD of this folder's README
#include <cstdio>
#include <cstdlib>

#include "llama.h"

int main(int argc, char** argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: llama_cache MODEL.gguf TOKENS TOKENS_AT_A_TIME\n");
        return 2;
    }
    llama_backend_init();
    llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (model == nullptr) return 1;
    llama_context_params wanted = llama_context_default_params();
    wanted.n_ctx = std::strtoul(argv[2], nullptr, 10);
    wanted.n_batch = wanted.n_ubatch = std::strtoul(argv[3], nullptr, 10);
    wanted.n_seq_max = 1;
    wanted.swa_full = false;
    return llama_init_from_model(model, wanted) == nullptr ? 1 : 0;
}
