/* Linear layers with one input and their low-rank paths in bfloat16, for processors that have pairs.h; others get
 * nothing from this file.  Of one layer:
 *
 *     low = (x ∘ m) Aᵀ,   y = x Wᵀ + b + s low Bᵀ                                            forwards
 *     dlow = s dy B,   dB = s dyᵀ low,   dA = dlowᵀ (x ∘ m),   dx = dy W + (dlow A) ∘ m      backwards
 *
 * Each product of the path is narrow (the rank), so that a library spends its time on calls and passes over memory.
 * Here some rows go through all products while they lie near, y and dx are written once, and the mask m is drawn
 * from its seed on the way (see dropout.py).
 * W comes in strips, see lora.py; where it does not, y and dx have its products already, and are added
 * to.  Sums are float32, rounded where they are stored; s includes the 1 / (1 - p) of dropout.
 * Compiled by code.py; the Python side is lora.py.
 */
#include "lora_ahead.h"
#include "lora_back.h"

#ifdef MULTIPLIES_PAIRS
int32_t multiplies_pairs(void) { return 1; }
#else
void lora_forward(const Lora *all, int32_t number) { (void)all, (void)number; }
void lora_backward(const Lora *all, int32_t number) { (void)all, (void)number; }
int32_t multiplies_pairs(void) { return 0; }
#endif
